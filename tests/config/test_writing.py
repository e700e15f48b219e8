"""Resolved values are written as TOML that reads back the same, and have a digest of their content."""

import math
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given

from vlm.config.positions import scan
from vlm.config.tree import Origin
from vlm.config.writing import digest, to_toml, toml_value

sys.path.insert(0, str(Path(__file__).parent))
from toml_values import tables, values


@given(tables)
def test_what_is_written_reads_back_equal_and_has_the_same_digest(table):
    again = tomllib.loads(to_toml(table))
    assert again == table
    assert digest(again) == digest(table)


@given(tables)
def test_comments_change_nothing_that_is_read(table):
    plain = to_toml(table)
    origins = {path: Origin("some file\n# odd.toml", 3, label='a"b\n[x]') for path in scan(plain)}
    assert tomllib.loads(to_toml(table, origins)) == table


@given(values)
def test_a_single_value_reads_back(value):
    assert tomllib.loads(f"x = {toml_value(value)}") == {"x": value}


def test_not_a_number_is_written():
    assert math.isnan(tomllib.loads(to_toml({"x": math.nan}))["x"])


def test_each_line_says_what_set_it():
    origins = {("a",): Origin("f.toml", 7, label="presets/f.toml"), ("b",): Origin.of_override("b")}
    assert to_toml({"a": 1, "b": 2}, origins) == "a = 1  # from presets/f.toml:7\nb = 2  # from the command line (b)\n"


def test_the_digest_ignores_key_order_and_sees_every_value():
    first = {"a": {"x": 1, "y": [1, 2]}, "b": "t"}
    assert digest(first) == digest({"b": "t", "a": {"y": [1, 2], "x": 1}})
    changed = [
        {"a": {"x": 2, "y": [1, 2]}, "b": "t"},
        {"a": {"x": 1, "y": [2, 1]}, "b": "t"},
        {"a": {"x": True, "y": [1, 2]}, "b": "t"},
        {"a": {"x": "1", "y": [1, 2]}, "b": "t"},
        {"a": {"x": 1.0, "y": [1, 2]}, "b": "t"},
        {"a": {"x": 1, "y": [1, 2]}},
    ]
    assert len({digest(values) for values in [first, *changed]}) == len(changed) + 1


def test_the_digest_stays_what_it_was():
    assert digest({"schema": 1, "lr": 1e-3, "name": "é"}) == (
        "b346c258b6de4b68b646b6e78d2e045f75feadec05ae56ec30f6a75186662a70"
    )


def test_none_is_refused_with_its_path():
    with pytest.raises(TypeError, match=r"a\.b is a NoneType"):
        to_toml({"a": {"b": None}})
