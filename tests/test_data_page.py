"""docs/data.md: its settings are settings, its addresses are detected as it says."""

import re
import tomllib
from pathlib import Path

import pytest

from vlm.data import DataOptions
from vlm.data.sources.uri import _KNOWN, _PREFIX, _detect

PAGE = (Path(__file__).parents[1] / "docs/data.md").read_text("utf-8")
BLOCKS = re.findall(r"^```toml\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_its_settings_are_read(block):
    table = {key: value for key, value in tomllib.loads(block)["data"].items() if value != "!delete"}
    assert DataOptions.model_validate(table).model_dump(exclude_unset=True).keys() == table.keys()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.tar", "wds"), ("pairs.jsonl", "jsonl"), ("text.jsonl.gz", "jsonl"), ("pairs.csv", "csv"), ("pairs.tsv", "csv"), ("llava.json", "json")],
)
def test_its_endings_are_detected(name, kind):
    assert name in PAGE or name.endswith(".tar")
    assert _detect([name], name) == kind


def test_its_prefixes_are_prefixes_and_errors_name_every_form():
    prefixes = re.search(r"a prefix \((.*?)\) settles", PAGE)
    assert prefixes is not None
    assert all(_PREFIX.match(prefix + "x") for prefix in re.findall(r"`(\w+:)`", prefixes[1]))
    assert all(word in _KNOWN for word in (".tar", ".jsonl", ".json", ".csv", ".tsv", "scenes:", "digits:", "clips:"))
