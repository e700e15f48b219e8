"""Resolving presets: inheritance, search, overrides, provenance, schema versions, and each error's place."""

from pathlib import Path

import pytest

from vlm.config import files
from vlm.config.catalogue import list_presets
from vlm.config.errors import ExitCode, PresetError
from vlm.config.load import merge_tables, resolve
from vlm.config.overrides import apply_overrides, parse_override
from vlm.config.tree import node_of


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes `name.toml` below a temporary working directory; `schema = 1` is put on the first line."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str, head: str = "schema = 1\n") -> Path:
        path = tmp_path / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + text, encoding="utf-8")
        return path

    return write


def refused(name, overrides=(), **named) -> PresetError:
    with pytest.raises(PresetError) as caught:
        resolve(name, overrides, **named)
    assert caught.value.exit_code is ExitCode.WRONG_REQUEST
    return caught.value


def test_a_preset_inherits_and_each_value_knows_its_line(write):
    write("base/b", "[train]\nsteps = 10\nseed = 1\n")
    write("x", 'extends = "base/b"\n[train]\n\nsteps = 20\n')
    found = resolve("x.toml", ["train.lr=0.5"])
    assert found.values == {"schema": 1, "train": {"steps": 20, "seed": 1, "lr": 0.5}}
    assert found.place(("train", "steps")) == "x.toml:5:9"
    assert found.place(("train", "steps"), key=True) == "x.toml:5:1"
    assert found.place(("train", "seed")) == "base/b.toml:4:8"
    assert found.place(("train", "lr")) == "command line: train.lr"
    assert str(found.origins["train", "seed"]) == "base/b.toml:4"
    assert [file.label for file in found.files] == ["base/b.toml", "x.toml"]


def test_of_several_bases_the_later_wins(write):
    write("a", "[t]\nx = 1\ny = 1\n")
    write("b", "[t]\ny = 2\nz = 2\n")
    write("x", 'extends = ["a", "b"]\n[t]\nz = 3\n')
    assert resolve("x.toml").values["t"] == {"x": 1, "y": 2, "z": 3}


def test_a_base_reached_by_two_ways_is_no_circle(write):
    write("root", "r = 1\n")
    write("a", 'extends = "root"\na = 1\n')
    write("b", 'extends = "root"\nb = 1\n')
    write("x", 'extends = ["a", "b"]\n')
    found = resolve("x.toml")
    assert found.values == {"schema": 1, "r": 1, "a": 1, "b": 1}
    assert [file.path.stem for file in found.files] == ["root", "a", "b", "x"]


def test_the_users_directories_come_before_the_packaged_presets(write, tmp_path):
    write("mine/clip-tiny", 'title = "mine"\n')
    assert resolve("clip-tiny", search=[tmp_path / "mine"]).values["title"] == "mine"
    assert "title" not in resolve("clip-tiny").values


def test_a_users_preset_extends_a_packaged_one(write):
    write("x", 'extends = "clip-tiny"\n[train]\nsteps = 3\n')
    found = resolve("x.toml")
    assert found.values["train"]["steps"] == 3
    assert found.values["method"]["key"] == "clip-tiny"


def test_a_run_directory_is_a_preset(write):
    write("runs/first/preset", "a = 1\n")
    assert resolve("runs/first").values["a"] == 1


def test_a_circle_is_refused_and_names_every_file(write):
    write("a", 'extends = "b"\n')
    write("b", 'extends = "c"\n')
    write("c", 'x = 1\nextends = "a"\n')
    error = refused("a.toml")
    assert error.where == "c.toml:3:11"
    assert "a.toml -> b.toml -> c.toml -> a.toml" in error.message


def test_a_missing_base_is_refused_with_the_chain_and_the_nearest_key(write):
    write("base/dual", "")
    write("b", 'extends = "base/daul"\n')
    write("a", 'extends = "b"\n')
    error = refused("a.toml")
    assert error.where == "b.toml:2:11"
    assert "no preset 'base/daul'; did you mean 'base/dual'?" in error.message
    assert "extended by a.toml:2:11" in error.remedy


def test_an_unknown_preset_is_refused_with_the_nearest_key():
    error = refused("clip-tinny")
    assert "did you mean 'clip-tiny'?" in error.message
    assert "vlm presets list" in error.remedy


def test_a_missing_file_is_refused(write):
    assert "no preset file nowhere.toml" in refused("nowhere.toml").message


def test_a_key_never_leaves_the_directories_of_presets(write, tmp_path):
    write("secret", "")
    (tmp_path / "presets").mkdir()
    assert "no preset '../secret'" in refused("../secret", search=[tmp_path / "presets"]).message


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("a = \n", "2:5", "not valid TOML: invalid value"),
        ("[t]\na = 1\na = 2\n", "4:6", "cannot overwrite a value"),
        ('a = "open\n', "2:10", "not valid TOML"),
        ("a = [1,\n", "2:8", "not valid TOML"),
        ("extends = 3\n", "2:11", "extends must be the key of a preset or a list of keys"),
        ('extends = ["a", 3]\n', "2:11", "extends must be"),
        ('[t]\nx = "!delete"\n', "3:1", "t.x is to be removed, but nothing sets it"),
        ('[[l]]\nname = "a"\nremove = true\n', "2:3", "l[0] is to be removed"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(write, text, place, message):
    write("x", text)
    error = refused("x.toml")
    assert error.where == f"x.toml:{place}"
    assert message in error.message


def test_bytes_that_are_no_text_are_refused(write, tmp_path):
    (tmp_path / "x.toml").write_bytes(b"schema = 1\n\xff\xfe")
    assert "not UTF-8 at byte 11" in refused("x.toml").message


@pytest.mark.parametrize("depth", [100, 200, 300, 350, 400, 450, 500, 5000])
def test_deep_nesting_is_read_or_refused_and_never_crashes(write, depth):
    write("x", "a = " + "[" * depth + "]" * depth)
    try:
        values = resolve("x.toml").values
    except PresetError as error:
        assert error.where == "x.toml"
        assert "nested too deeply" in error.message
    else:
        assert set(values) == {"schema", "a"}


@pytest.mark.parametrize(
    ("head", "place", "message"),
    [
        ("", "1:1", "does not say its schema"),
        ("schema = 99\n", "1:10", "has schema 99; this vlm reads schemas up to 1"),
        ('schema = "1"\n', "1:10", "schema must be a whole number"),
        ("schema = true\n", "1:10", "schema must be a whole number"),
        ("schema = 0\n", "1:10", "schema must be a whole number"),
    ],
)
def test_the_schema_must_be_known(write, head, place, message):
    write("x", "a = 1\n", head)
    error = refused("x.toml")
    assert error.where == f"x.toml:{place}"
    assert message in error.message


def test_an_older_schema_is_migrated_step_by_step_and_keeps_its_places(write):
    def to_2(values):
        return {("train" if key == "training" else key): value for key, value in values.items()}

    def to_3(values):
        return {**values, "train": {**values["train"], "steps": values["train"]["steps"] * 10}}

    write("old", "[training]\nsteps = 7\n")
    write("new", 'extends = "old"\n[train]\nseed = 1\n', "schema = 3\n")
    found = resolve("new.toml", schema=3, migrations={1: to_2, 2: to_3})
    assert found.values == {"schema": 3, "train": {"steps": 70, "seed": 1}}
    assert found.place(("train", "seed")) == "new.toml:4:8"
    error = refused("new.toml", schema=3, migrations={1: to_2})
    assert "no way from schema 2 to 3" in error.message


def test_every_schema_before_this_one_has_a_migration():
    assert set(files.MIGRATIONS) == set(range(1, files.SCHEMA))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=3", 3),
        ("a.b=1e-3", 1e-3),
        ("a.b=true", True),
        ("a.b=[1, 2]", [1, 2]),
        ("a.b={x = 1}", {"x": 1}),
        ('a.b="3"', "3"),
        ("a.b=word", "word"),
        ("a.b=two words", "two words"),
        ("a.b=data/{00..99}.tar", "data/{00..99}.tar"),
        ("a.b=x=y", "x=y"),
        ("a.b=", ""),
        ("a.b=007", "007"),
        ("a.b=1\nc=2", "1\nc=2"),
        (" a.b = 3 ", 3),
    ],
)
def test_the_value_of_an_override_is_toml_or_a_bare_word(text, value):
    override = parse_override(text)
    assert (override.parts, override.value) == (("a", "b"), value)


@pytest.mark.parametrize("text", ["word", "=3", "a..b=3", ""])
def test_what_is_no_override_is_refused(text):
    with pytest.raises(PresetError, match="is no override") as caught:
        parse_override(text)
    assert caught.value.where == "command line"


@pytest.mark.parametrize("text", ["a=[1,", 'a="open', "a={x}", "a='open"])
def test_a_value_that_begins_like_toml_and_is_none_is_refused(text):
    with pytest.raises(PresetError, match="neither a TOML value nor a bare word") as caught:
        parse_override(text)
    assert caught.value.where == "command line: a"


BASE = {
    "schema": 1,
    "schedule": {"kind": "cosine", "warmup": 5},
    "objectives": [{"name": "c", "kind": "x", "weight": 1}, {"name": "d", "kind": "y"}],
    "stages": [{"train": {"steps": 1}}, {"train": {"steps": 2}}],
}


def overridden(*texts):
    return apply_overrides(node_of(BASE), texts).plain()


def test_list_entries_are_addressed_by_name_and_index():
    assert overridden("objectives.d.weight=2")["objectives"][1] == {"name": "d", "kind": "y", "weight": 2}
    assert overridden("stages.1.train.steps=9")["stages"] == [{"train": {"steps": 1}}, {"train": {"steps": 9}}]


def test_overrides_remove_keys_and_entries():
    assert "warmup" not in overridden("schedule.warmup=!delete")["schedule"]
    assert [entry["name"] for entry in overridden("objectives.c=!delete")["objectives"]] == ["d"]


def test_the_last_override_wins():
    assert overridden("schedule.warmup=6", "schedule.warmup=7")["schedule"]["warmup"] == 7
    assert overridden("schedule.kind=a", "schedule.kind=b")["schedule"] == {"kind": "b"}
    assert overridden("schedule={kind='a'}", "schedule.kind=b", "schedule.z=1")["schedule"] == {"kind": "b", "z": 1}


@pytest.mark.parametrize(
    "texts", [("schedule.kind=step", "schedule.every=3"), ("schedule.every=3", "other.x=1", "schedule.kind=step")]
)
def test_switching_a_kind_drops_the_bases_keys_and_keeps_the_command_lines_in_any_order(texts):
    assert overridden(*texts)["schedule"] == {"kind": "step", "every": 3}


def test_an_entrys_kind_is_switched_in_place():
    changed = overridden("objectives.c.margin=2", "objectives.c.kind=z")["objectives"]
    assert changed == [{"name": "c", "kind": "z", "margin": 2}, {"name": "d", "kind": "y"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objectives.e.weight=2", "the list has no entry 'e'"),
        ("stages.2.x=1", "the list has no entry '2'"),
        ("stages.train.steps=1", "the list has no entry 'train'"),
    ],
)
def test_an_entry_that_is_not_there_is_refused(text, message):
    with pytest.raises(PresetError) as caught:
        overridden(text)
    assert message in caught.value.message
    assert caught.value.where == f"command line: {text.partition('=')[0]}"


def test_a_misspelt_entry_is_refused_with_the_nearest_name():
    tree = node_of({"objectives": [{"name": "contrastive"}]})
    with pytest.raises(PresetError, match="did you mean 'contrastive'"):
        apply_overrides(tree, ["objectives.contrastve.weight=2"])


def test_a_stage_laid_over_the_top_level_keeps_the_places_of_both(write):
    write(
        "x",
        '[train]\nsteps = 1\nseed = 2\n[[objectives]]\nname = "a"\nweight = 1\n[[objectives]]\nname = "b"\n'
        '[[stages]]\nname = "s"\ntrain.steps = 5\n[[stages.objectives]]\nname = "a"\nremove = true\n'
        '[[stages.objectives]]\nname = "b"\nweight = 3\n',
    )
    found = resolve("x.toml")
    whole = {key: found.values[key] for key in ("train", "objectives")}
    stage = found.derive(merge_tables(whole, found.values["stages"][0]), inside=("stages", 0))
    assert stage.values["train"] == {"steps": 5, "seed": 2}
    assert stage.values["objectives"] == [{"name": "b", "weight": 3}]
    assert stage.place(("train", "steps")) == "x.toml:12:15"
    assert stage.place(("train", "seed")) == "x.toml:4:8"
    assert stage.place(("objectives", 0, "name")) == "x.toml:17:8"
    assert stage.place(("objectives", 0, "weight")) == "x.toml:18:10"


def test_a_removal_in_a_stage_that_meets_nothing_is_refused(write):
    write("x", '[train]\nsteps = 1\n[[stages]]\nname = "s"\ntrain.sedd = "!delete"\n')
    found = resolve("x.toml")
    merged = merge_tables({"train": found.values["train"]}, found.values["stages"][0])
    with pytest.raises(PresetError, match="nothing sets it") as caught:
        found.derive(merged, inside=("stages", 0))
    assert caught.value.where == "x.toml:6:7"


def test_the_catalogue_reads_heads_and_inherits_them(write, tmp_path):
    write("p/base/b", '[method]\ncommand = "distill"\ntags = ["t"]\n')
    write("p/x", 'extends = "base/b"\n[method]\nkey = "x"\ntitle = "X"\n')
    write("p/broken", "a = \n")
    entries = {entry.key: entry for entry in list_presets([tmp_path / "p"])}
    assert (entries["x"].title, entries["x"].command, entries["x"].tags) == ("X", "distill", ("t",))
    assert "p/broken.toml:2:5" in entries["broken"].problem
    assert "base/b" not in entries
    assert "clip-tiny" in entries


def test_every_packaged_preset_is_named_after_its_key_and_has_a_title():
    entries = list_presets()
    assert entries
    for entry in entries:
        assert entry.problem is None
        assert entry.title
        assert resolve(entry.key).values["method"]["key"] == entry.key
