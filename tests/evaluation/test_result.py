"""Results on disk, gates, tables."""

import json

import pytest

from vlm.config.errors import DataError, GateFailed, RequestError, RunFailed
from vlm.evaluation.result import Gate, Result, read_result, save_results, write_json
from vlm.evaluation.table import table_of


@pytest.fixture
def result():
    return Result(
        task="retrieval",
        name="val set",
        samples=40,
        metrics={"image_to_text": {"r@1": 31.25}},
        intervals={"image_to_text": {"r@1": {"lower": 20.0, "upper": 41.0}}},
        chance={"image_to_text": {"r@1": 0.5}},
        data={"uri": "x.tar"},
    )


@pytest.mark.parametrize(
    "text",
    [
        "image_to_text/r@1>=31",
        "image_to_text.r@1 <= 32",
        "lower:image_to_text/r@1>=20",
        "image_to_text/r@1>=31.25",
    ],
)
def test_gates_that_hold(result, text):
    Gate.parse(text).check(result)


@pytest.mark.parametrize(
    "text", ["image_to_text/r@1>=31.3", "lower:image_to_text/r@1>=20.1", "image_to_text/r@1<=31"]
)
def test_gates_that_fail_say_value_and_bound(result, text):
    with pytest.raises(GateFailed, match="wanted"):
        Gate.parse(text).check(result)


def test_gates_refuse_nonsense_and_unknown_metrics(result):
    with pytest.raises(RequestError, match="is no gate"):
        Gate.parse("r@1 = 5")
    with pytest.raises(RequestError, match="is no gate"):
        Gate.parse("r@1>=high")
    with pytest.raises(RequestError, match=r"no metric 'top1'") as caught:
        Gate.parse("top1>=3").check(result)
    assert "image_to_text/r@1" in str(caught.value)


def test_results_are_stored_under_safe_names_and_read_back(result, tmp_path):
    path = save_results([result], tmp_path)[0]
    assert path == tmp_path / "evaluation" / "val-set.json"
    assert read_result(path) == json.loads(json.dumps(result.as_json()))
    assert result.flat() == {"val set/image_to_text/r@1": 31.25}
    assert [p.name for p in path.parent.iterdir()] == ["val-set.json"]


def test_what_is_no_result_is_refused(tmp_path):
    path = tmp_path / "x.json"
    for content in ("[]", "{", '{"task": "x"}'):
        path.write_text(content)
        with pytest.raises(DataError, match=r"x\.json"):
            read_result(path)


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match="cannot be written"):
        write_json(tmp_path / "file" / "x.json", {})


def test_the_table_shows_value_interval_and_chance(result):
    lines = table_of(result).splitlines()
    assert lines[0] == "val set (retrieval): 40 samples of x.tar, percent"
    assert lines[2].split() == ["image", "to", "text", "r@1", "31.2", "20.0", "..", "41.0", "0.50"]
    assert table_of(result.as_json()) == table_of(result)
