"""The scanner knows where each key of a TOML text stands."""

import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.config.positions import Position, parse_key, scan
from vlm.config.writing import to_toml

sys.path.insert(0, str(Path(__file__).parent))
from toml_values import tables, text


def paths_of(value, path=()):
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from paths_of(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from paths_of(item, (*path, index))


@given(tables)
def test_every_path_of_a_text_has_a_position_and_no_other_path_has(values):
    written = to_toml(values)
    assert set(scan(written)) == set(paths_of(tomllib.loads(written)))


@given(tables)
def test_the_position_of_a_bare_key_is_where_its_letters_stand(values):
    written = to_toml(values)
    lines = written.split("\n")
    for path, position in scan(written).items():
        key = path[-1]
        if isinstance(key, str) and key.isascii() and key.isalnum():
            assert lines[position.line - 1][position.column - 1 :].lstrip('"').startswith(key), (path, position)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_a_text_that_is_no_toml_never_breaks_the_scanner(broken):
    try:
        values = tomllib.loads(broken)
    except tomllib.TOMLDecodeError:
        scan(broken)
        return
    assert set(paths_of(values)) <= set(scan(broken))


@given(text)
def test_strings_with_any_content_do_not_shift_what_follows(content):
    escaped = to_toml({"a": content})
    assert scan(f"{escaped}b = 1\n")[("b",)] == Position(2, 1, 2, 5)


DOCUMENT = '''\
schema = 1
  indented   =   "x"  # a comment with = and [brackets]
a.b."c d" = 2
many = [
  1,            # one
  [2, 3],
  { k = "v", n.m = 4 },
]
long = """
[not.a.table]
key = "no key" \\""" still
"""
literal = \'\'\'it\'s """ fine\'\'\'

[table.sub]
when = 1979-05-27 07:32:00
[ "quoted table" . x ]
y = 0x1F
[[entries]]
name = "first"
[entries.options]
deep = true
[[entries]]
name = "second"
[[entries.list]]
z = 1
[table]
late = 1
'''


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (("schema",), (1, 1, 1, 10)),
        (("indented",), (2, 3, 2, 18)),
        (("a",), (3, 1, 3, 13)),
        (("a", "b", "c d"), (3, 5, 3, 13)),
        (("many",), (4, 1, 4, 8)),
        (("many", 0), (5, 3, 5, 3)),
        (("many", 1, 1), (6, 7, 6, 7)),
        (("many", 2, "k"), (7, 5, 7, 9)),
        (("many", 2, "n", "m"), (7, 16, 7, 20)),
        (("long",), (9, 1, 9, 8)),
        (("literal",), (13, 1, 13, 11)),
        (("table", "sub"), (15, 8, 15, 1)),
        (("table", "sub", "when"), (16, 1, 16, 8)),
        (("quoted table", "x", "y"), (18, 1, 18, 5)),
        (("entries", 0, "options", "deep"), (22, 1, 22, 8)),
        (("entries", 1), (23, 3, 23, 1)),
        (("entries", 1, "list", 0, "z"), (26, 1, 26, 5)),
        (("table",), (27, 2, 27, 1)),
        (("table", "late"), (28, 1, 28, 8)),
    ],
)
def test_positions_in_a_document_that_uses_all_of_toml(path, expected):
    tomllib.loads(DOCUMENT)
    assert scan(DOCUMENT)[path] == Position(*expected)


def test_a_document_with_carriage_returns_has_the_same_positions():
    assert scan(DOCUMENT.replace("\n", "\r\n")) == scan(DOCUMENT)


@pytest.mark.parametrize(
    ("text", "parts", "end"),
    [("a=1", ("a",), 1), ("a.b = 1", ("a", "b"), 4), ('"x.y".z=', ("x.y", "z"), 7), ("'q'=1", ("q",), 3)],
)
def test_the_key_of_an_override(text, parts, end):
    assert parse_key(text) == (parts, end)


@pytest.mark.parametrize("text", ["", "=1", ".a=1", "a..b=1", '"open=1', "a.", " "])
def test_what_is_no_key_is_refused(text):
    with pytest.raises(ValueError, match="is no key"):
        parse_key(text)
