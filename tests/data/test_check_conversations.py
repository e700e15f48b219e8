"""`vlm data check` and `inspect` on conversations: placeholders against pictures, by row and with both counts."""

from __future__ import annotations

import json

import pytest

from tests.data.talk_makers import talk, write_talks
from vlm.cli.main import main
from vlm.data.check import check
from vlm.data.loader import open_split
from vlm.data.options import DataOptions


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main(["data", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def uri(tmp_path):
    entries = [talk(n, pictures=n % 3) for n in range(9)]
    entries[4]["conversations"][0]["value"] = "<image><image> which?"
    entries[5]["image"] = entries[5]["image"][:1]
    return write_talks(tmp_path, entries)


def test_placeholders_are_compared_with_pictures(run, uri):
    code, out, _ = run("check", uri, "--placeholders", "--json")
    assert code == 3
    report = json.loads(out)
    assert report["reasons"] == {"placeholder_mismatch": 2}
    assert report["first_bad"] == [
        {"key": "talks.jsonl:5", "reason": "placeholder_mismatch", "detail": "text: 2 placeholders, 1 pictures"},
        {"key": "talks.jsonl:6", "reason": "placeholder_mismatch", "detail": "text: 2 placeholders, 1 pictures"},
    ]
    assert report["placeholders"] == {"text": {"none": 3, "1": 2, "2": 2}}
    assert report["pictures"]["count"] == 6
    code, out, _ = run("check", uri, "--placeholders", "--budget", 0.5)
    assert code == 0
    assert "talks.jsonl:5: placeholder_mismatch text: 2 placeholders, 1 pictures" in out
    assert "none: 3, 1: 2, 2: 2" in out


def test_a_llava_file_is_checked_and_inspected(run, uri, tmp_path):
    entries = [json.loads(line) for line in (tmp_path / "talks.jsonl").read_text().splitlines()]
    (tmp_path / "all.json").write_text(json.dumps(entries[:4]))
    code, out, _ = run("check", tmp_path / "all.json", "--placeholders")
    assert code == 0
    assert "LLaVA conversations" in out
    code, out, _ = run("inspect", tmp_path / "all.json")
    assert code == 0
    assert "LLaVA conversations" in out
    assert "BAD" not in out


def test_messages_are_read_as_such_unasked(run, uri):
    code, out, _ = run("check", uri, "--json")
    report = json.loads(out)
    assert (code, report["reasons"]) == (3, {"placeholder_mismatch": 2})
    # With a caption beside the messages there is something to read without them.
    assert "placeholders" not in json.loads(run("check", "scenes:?n=5", "--json")[1])


def test_a_preset_says_how_data_are_read(run, uri, tmp_path):
    preset = tmp_path / "mine.toml"
    preset.write_text(
        'schema = 1\nextends = "clip-tiny"\n[method]\nkey = "mine"\ntitle = "t"\ncommand = "pretrain"\n'
        f'[data]\nsource = "{uri}"\n[data.streams.text]\nkind = "conversation"\ntext_only = true\n'
    )
    code, out, err = run("check", "--preset", preset, "--json")
    assert code == 3, err
    assert json.loads(out)["reasons"] == {"placeholder_mismatch": 2}
    code, out, err = run("check", "scenes:?n=5", "--preset", preset, "--json")
    assert json.loads(out)["reasons"] == {"missing_text": 5}
    assert run("check")[0] == 2


def test_a_mixture_is_checked_source_by_source(uri):
    streams = {"text": {"kind": "conversation", "text_only": True}}
    mixture = {
        "talks": {"source": uri, "streams": streams},
        "scenes": {"source": "scenes:?n=4&size=16"},
        "asked": {"source": "scenes:?n=4&size=16", "streams": {"text": {"kind": "conversation", "questions": "questions"}}},
    }
    options = DataOptions.model_validate({"mixture": mixture, "bad_samples": {"budget": 0.5}})
    report = check(open_split(options, "train"), options)
    assert report["good"] == 15
    assert {entry["key"] for entry in report["first_bad"]} == {"talks/talks.jsonl:5", "talks/talks.jsonl:6"}
    assert report["placeholders"] == {"text": {"none": 7, "1": 2, "2": 2}}
