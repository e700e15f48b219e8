"""Results on disk: readable, whole, and clear about what is not theirs."""

import json
import math

import pytest

from vlm.config.errors import DataError
from vlm.workflows.reproduce.store import Results

UNIT = {"key": "a" * 64, "arm": "x", "figures": {"m": 1.0}}


def test_units_and_verdicts_come_back(tmp_path):
    results = Results(tmp_path / "results")
    assert results.read("x").units == {}
    results.add_unit("x", UNIT)
    results.add_unit("x", {**UNIT, "key": "b" * 64})
    results.add_verdict("x", {"data": "real", "units": ["a"], "verdict": "holds"})
    assert set(results.read("x").units) == {"a" * 64, "b" * 64}
    assert results.find("b" * 64)["arm"] == "x"
    assert results.find("c" * 64) is None
    assert results.latest("x", "real")["verdict"] == "holds"
    assert results.latest("x", "builtin") is None


def test_the_file_is_json_with_one_unit_a_line(tmp_path):
    results = Results(tmp_path)
    for letter in "ab":
        results.add_unit("x", {**UNIT, "key": letter * 64})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text)["schema"] == 1
    assert [json.loads(line.rstrip(","))["key"][0] for line in text.splitlines() if line.startswith("  {")] == ["a", "b"]
    assert not list(tmp_path.glob(".*"))


def test_a_verdict_of_the_same_units_takes_the_older_ones_place(tmp_path):
    results = Results(tmp_path)
    for verdict, units in (("holds", ["a"]), ("fails", ["a"]), ("not seen", ["a", "b"])):
        results.add_verdict("x", {"data": "real", "units": units, "verdict": verdict})
    assert [one["verdict"] for one in results.read("x").verdicts] == ["fails", "not seen"]
    assert results.latest("x", "real")["verdict"] == "not seen"


def test_an_interval_without_bounds_is_null(tmp_path):
    results = Results(tmp_path)
    results.add_verdict("x", {"data": "real", "units": [], "difference": {"lower": -math.inf, "upper": math.inf, "mean": 1.23456789}})
    assert results.latest("x", "real")["difference"] == {"lower": None, "upper": None, "mean": 1.234568}


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"schema": 2, "units": [], "verdicts": []}', '{"schema": 1, "units": 3, "verdicts": []}', "\x00"]
)
def test_a_file_of_something_else_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=r"x\.json"):
        Results(tmp_path).read("x")
