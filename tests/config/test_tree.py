"""How one preset is laid over another."""

import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from vlm.config.load import merge_tables
from vlm.config.tree import DELETE, leftover_markers, node_of

sys.path.insert(0, str(Path(__file__).parent))
from toml_values import scalars, tables

names = st.sampled_from("abcd")
entries = st.lists(
    st.builds(lambda name, options: {**options, "name": name}, names, st.dictionaries(st.sampled_from("xyz"), scalars)),
    unique_by=lambda entry: entry["name"],
    max_size=4,
)


def plain(table):
    """Without the two words that mean something to a merge."""
    if isinstance(table, dict):
        return {k: plain(v) for k, v in table.items() if k not in ("kind", "name", "remove")}
    if isinstance(table, list):
        return [plain(item) for item in table]
    return "" if table == DELETE else table


@given(tables)
def test_nothing_laid_over_a_table_and_a_table_over_nothing_are_the_table(table):
    table = plain(table)
    assert merge_tables(table, {}) == table == merge_tables({}, table)


@given(tables)
def test_a_table_laid_over_itself_is_itself(table):
    table = plain(table)
    assert merge_tables(table, table) == table


@given(tables, tables, tables)
def test_merging_flat_tables_is_associative(a, b, c):
    # Not so where a value lies between two tables: it hides the first one, unless the other two are merged before.
    a, b, c = ({k: v for k, v in plain(t).items() if not isinstance(v, dict)} for t in (a, b, c))
    assert merge_tables(merge_tables(a, b), c) == merge_tables(a, merge_tables(b, c))


@given(tables, tables)
def test_every_value_laid_over_wins(base, over):
    base, over = plain(base), plain(over)
    merged = merge_tables(base, over)

    def check(over, merged):
        for key, value in over.items():
            if isinstance(value, dict):
                check(value, merged[key])
            else:
                assert merged[key] == value

    check(over, merged)
    assert set(merged) == set(base) | set(over)


@given(tables, tables)
def test_merging_changes_neither_argument(base, over):
    before = repr(base), repr(over)
    merge_tables(base, over)
    assert (repr(base), repr(over)) == before


@given(entries, entries)
def test_named_entries_keep_the_bases_order_and_new_ones_follow(base, over):
    merged = merge_tables({"list": base}, {"list": over})["list"]
    if not base or not over:
        assert merged == over
        return
    new = [entry["name"] for entry in over if entry["name"] not in {b["name"] for b in base}]
    said = [entry["name"] for entry in over]
    complete = {entry["name"] for entry in base} <= set(said)
    assert [entry["name"] for entry in merged] == (said if complete else [entry["name"] for entry in base] + new)
    for entry in merged:
        parts = [e for e in (*base, *over) if e["name"] == entry["name"]]
        expected = merge_tables(parts[0], parts[-1])
        assert entry == expected


def test_a_stage_goes_between_two_by_naming_all():
    base = {"stages": [{"name": "align", "steps": 1}, {"name": "instruct", "steps": 2}]}
    over = {"stages": [{"name": "align"}, {"name": "see", "steps": 3}, {"name": "instruct", "steps": 4}]}
    merged = merge_tables(base, over)["stages"]
    assert [(e["name"], e["steps"]) for e in merged] == [("align", 1), ("see", 3), ("instruct", 4)]


@given(entries.filter(bool), names)
def test_an_entry_is_removed_by_name(base, name):
    merged = merge_tables({"list": base}, {"list": [{"name": name, "remove": True}]})
    left = [entry for entry in base if entry["name"] != name]
    if len(left) < len(base):
        assert merged["list"] == left
    else:  # nothing to remove: the marker stays, and loading refuses it
        assert merged["list"] == [*base, {"name": name, "remove": True}]


def test_lists_without_names_replace():
    assert merge_tables({"a": [1, 2, 3]}, {"a": [4]}) == {"a": [4]}
    assert merge_tables({"a": [{"x": 1}]}, {"a": [{"y": 2}]}) == {"a": [{"y": 2}]}
    assert merge_tables({"a": [{"name": "n"}]}, {"a": []}) == {"a": []}


def test_the_delete_marker_removes_a_key():
    assert merge_tables({"a": {"x": 1, "y": 2}}, {"a": {"x": DELETE}}) == {"a": {"y": 2}}


def test_a_marker_that_meets_nothing_is_kept_and_found():
    merged = merge_tables({"a": {}}, {"a": {"x": DELETE}, "stages": [{"name": "s", "y": DELETE}]})
    assert merged["a"] == {"x": DELETE}
    assert [path for path, _ in leftover_markers(node_of(merged), frozenset({"stages"}))] == [("a", "x")]


def test_a_key_removed_by_one_layer_may_be_set_again_by_the_next():
    first = merge_tables({"a": {"x": {"k": 1}}}, {"a": {"x": DELETE}})
    assert merge_tables(first, {"a": {"x": {"m": 2}}}) == {"a": {"x": {"m": 2}}}


def test_another_kind_drops_the_keys_of_the_old_one():
    base = {"schedule": {"kind": "cosine", "warmup": 5, "deep": {"x": 1}}}
    assert merge_tables(base, {"schedule": {"kind": "constant"}}) == {"schedule": {"kind": "constant"}}
    assert merge_tables(base, {"schedule": {"kind": "cosine", "warmup": 6}}) == {
        "schedule": {"kind": "cosine", "warmup": 6, "deep": {"x": 1}}
    }


def test_an_entry_of_another_kind_keeps_its_name_and_place():
    base = {"objectives": [{"name": "a", "kind": "x", "p": 1}, {"name": "b", "kind": "y"}]}
    over = {"objectives": [{"name": "a", "kind": "z", "q": 2}]}
    assert merge_tables(base, over)["objectives"] == [{"name": "a", "kind": "z", "q": 2}, {"name": "b", "kind": "y"}]


def test_a_base_without_a_kind_cannot_be_told_apart_and_keeps_its_keys():
    assert merge_tables({"s": {"warmup": 5}}, {"s": {"kind": "constant"}}) == {"s": {"warmup": 5, "kind": "constant"}}
