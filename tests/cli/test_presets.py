"""`vlm presets` and the completion that reads presets."""

import json
import os
import subprocess
import sys
import tomllib
from typing import Literal

import pytest
from pydantic import Field

from vlm.cli.main import main
from vlm.cli.presets import explain_schema
from vlm.config.errors import RequestError
from vlm.config.load import resolve
from vlm.config.options import Options
from vlm.config.writing import digest


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/base").mkdir(parents=True)
    (tmp_path / "mine/base/b.toml").write_text('schema = 1\n[method]\ncommand = "distill"\n[train]\nsteps = 5\n')
    (tmp_path / "mine/x.toml").write_text(
        'schema = 1\nextends = "base/b"\n[method]\nkey = "x"\ntitle = "An x"\ntags = ["small"]\n[train]\nlr = 1e-3\n'
    )
    return tmp_path / "mine"


def result(capsys, *words):
    code = main(list(words))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_list_names_key_title_and_command(capsys, folder):
    listed = json.loads(result(capsys, "presets", "list", "--presets", str(folder), "--json"))
    mine = next(entry for entry in listed if entry["key"] == "x")
    assert (mine["title"], mine["command"], mine["tags"]) == ("An x", "distill", ["small"])
    assert {"clip-tiny", "siglip-tiny"} <= {entry["key"] for entry in listed}
    assert not any(entry["key"].startswith("base/") for entry in listed)
    text = result(capsys, "presets", "list", "--presets", str(folder))
    assert "An x" in text


def test_list_is_narrowed_by_command_and_tag(capsys, folder):
    words = ("presets", "list", "--presets", str(folder), "--json")
    assert [e["key"] for e in json.loads(result(capsys, *words, "--tag", "small"))] == ["x"]
    assert all(e["command"] == "distill" for e in json.loads(result(capsys, *words, "--command", "distill")))


def test_a_tag_that_no_preset_has_is_answered_with_those_there_are(capsys, folder):
    assert main(["presets", "list", "--tag", "huge", "--presets", str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "small" in captured.err.split("tags ")[1]
    assert "dual-encoder" in captured.err


def test_a_broken_file_is_warned_of_and_hides_no_other(capsys, folder):
    (folder / "bad.toml").write_text("a = \n")
    assert main(["presets", "list", "--presets", str(folder), "--json"]) == 0
    captured = capsys.readouterr()
    assert "mine/bad.toml:1:5" in captured.err
    assert "x" in {entry["key"] for entry in json.loads(captured.out)}


def test_show_prints_the_file_as_it_is_written(capsys, folder):
    assert result(capsys, "presets", "show", "x", "--presets", str(folder)) == (folder / "x.toml").read_text()


def test_show_resolved_says_what_set_each_value_and_reads_back(capsys, folder):
    text = result(capsys, "presets", "show", "mine/x.toml", "--resolved", "train.seed=7")
    assert "steps = 5  # from mine/base/b.toml:5" in text
    assert "seed = 7  # from the command line (train.seed)" in text
    again = tomllib.loads(text)
    assert digest(again) == digest(resolve("mine/x.toml", ["train.seed=7"]).values)


def test_what_is_shown_resolved_runs_the_same_again(capsys, folder):
    (folder / "again.toml").write_text(result(capsys, "presets", "show", "clip-tiny", "--resolved"))
    assert digest(resolve(folder / "again.toml").values) == digest(resolve("clip-tiny").values)


def test_show_as_json_has_values_origins_and_digest(capsys, folder):
    shown = json.loads(result(capsys, "presets", "show", "mine/x.toml", "--json"))
    assert shown["values"]["train"] == {"steps": 5, "lr": 1e-3}
    assert shown["origins"]["train.steps"] == "mine/base/b.toml:5"
    assert shown["files"] == ["mine/base/b.toml", "mine/x.toml"]
    assert shown["digest"] == digest(shown["values"])


@pytest.mark.parametrize(("override", "says"), [("train.stesp=3", "did you mean 'steps'"), ("train.steps=soon", "expected integer")])
def test_show_refuses_a_wrong_setting_of_the_command_line(capsys, override, says):
    assert main(["presets", "show", "clip-tiny", override]) == 2
    captured = capsys.readouterr()
    assert (captured.out, says in captured.err) == ("", True)


def test_show_of_an_unknown_preset_exits_with_2(capsys):
    assert main(["presets", "show", "clip-tinny"]) == 2
    assert "did you mean 'clip-tiny'" in capsys.readouterr().err


def test_diff_shows_only_what_differs_and_what_set_it(capsys, folder):
    (folder / "y.toml").write_text('schema = 1\nextends = "x"\n[train]\nsteps = 6\nlr = 1e-3\nnew = true\n')
    assert json.loads(result(capsys, "presets", "diff", "mine/x.toml", "mine/y.toml", "--json")) == [
        {"key": "train.steps", "first": 5, "second": 6},
        {"key": "train.new", "first": None, "second": True},
    ]
    assert result(capsys, "presets", "diff", "mine/x.toml", "mine/y.toml") == (
        "train.steps\n  - 5  # from mine/base/b.toml:5\n  + 6  # from mine/y.toml:4\n"
        "train.new\n  + true  # from mine/y.toml:6\n"
    )
    assert json.loads(result(capsys, "presets", "diff", "clip-tiny", "clip-tiny", "--json")) == []


class Train(Options):
    steps: int = Field(10, description="updates")
    lr: float = Field(description="rate")
    mode: Literal["a", "b"] = "a"


class Toy(Options):
    schema_: int = Field(alias="schema")
    method: dict[str, object]
    train: Train


def test_explain_says_type_default_value_and_origin(capsys, folder):
    explain_schema("mine/x.toml", "train", (), True, Toy)
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["train.steps"] == {
        "key": "train.steps",
        "type": "integer",
        "required": False,
        "default": 10,
        "description": "updates",
        "set": True,
        "value": 5,
        "from": "mine/base/b.toml:5",
    }
    assert rows["train.mode"]["set"] is False
    assert rows["train.mode"]["value"] == "a"
    explain_schema("mine/x.toml", "train.steps", (), False, Toy)
    assert capsys.readouterr().out == "train.steps = 5\n    integer, default 10; from mine/base/b.toml:5\n    updates\n"


def test_explain_of_an_unknown_key_names_the_nearest(folder):
    with pytest.raises(RequestError, match=r"did you mean 'train\.steps'"):
        explain_schema("mine/x.toml", "train.stps", (), False, Toy)


def test_explain_uses_the_schema_of_presets(capsys):
    rows = json.loads(result(capsys, "presets", "explain", "clip-tiny", "objectives.contrastive", "--json"))
    assert {"objectives.contrastive.form", "objectives.contrastive.weight"} <= {row["key"] for row in rows}


def test_explain_of_a_stage_says_where_its_keys_are_explained(capsys):
    assert main(["presets", "explain", "vlm-tiny", "stages.align.optimizer.lr"]) == 2
    assert "vlm presets explain vlm-tiny optimizer.lr" in capsys.readouterr().err


def test_check_accepts_every_packaged_preset(capsys):
    checked = json.loads(result(capsys, "presets", "check", "--all", "--json"))
    listed = json.loads(result(capsys, "presets", "list", "--json"))
    assert [entry["key"] for entry in checked] == [entry["key"] for entry in listed]


def test_check_refuses_a_misspelt_key_with_its_place(capsys, folder):
    (folder / "bad.toml").write_text('schema = 1\nextends = "clip-tiny"\n[train]\nstps = 5\n')
    assert main(["presets", "check", "mine/bad.toml"]) == 2
    captured = capsys.readouterr()
    assert "mine/bad.toml:4:1: unknown key 'stps' in [train]; did you mean 'steps'?" in captured.err
    assert main(["presets", "check", "mine/bad.toml", "clip-tiny", "--json"]) == 2
    bad, good = json.loads(capsys.readouterr().out)
    assert (bad["ok"], good["ok"]) == (False, True)
    assert bad["problems"][0]["where"] == "mine/bad.toml:4:1"


def test_check_takes_a_directory_and_leaves_building_blocks_out(capsys, tmp_path):
    (tmp_path / "p/base").mkdir(parents=True)
    (tmp_path / "p/base/b.toml").write_text("schema = 1\nnonsense = 1\n")
    (tmp_path / "p/x.toml").write_text('schema = 1\nextends = "clip-tiny"\n')
    assert result(capsys, "presets", "check", str(tmp_path / "p")).count("ok  ") == 1


def test_check_of_nothing_is_a_wrong_request(capsys, tmp_path):
    assert main(["presets", "check"]) == 2
    assert main(["presets", "check", str(tmp_path)]) == 2
    capsys.readouterr()


def completions(line):
    """What bash is offered for a line; the last word is the one being typed."""
    words = line.split(" ")
    code = (
        "import sys; sys.argv = ['vlm']; from vlm.cli.main import main; code = main([]); "
        "print('heavy', [m for m in ('torch', 'pydantic', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    environment = {**os.environ, "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_VLM_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    assert done.stderr.strip() == "heavy []"
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


def test_completion_offers_commands_options_presets_and_keys():
    assert {"pretrain", "presets", "predict"} == set(completions("vlm pre"))
    assert "--json" in completions("vlm presets list --")
    assert {"clip", "clip-tiny"} <= set(completions("vlm presets show cl"))
    assert "train.steps=" in completions("vlm presets show clip-tiny train.")
    assert "objectives.contrastive.form=" in completions("vlm presets show clip-tiny obj")
    assert completions("vlm presets show clip-tiny train.steps=") == ["train.steps=100"]
    assert "train.steps" in completions("vlm presets explain clip-tiny train.")
    assert completions("vlm presets show no-such-preset train.") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_call_back_into_vlm(capsys, shell):
    text = result(capsys, "completion", shell)
    assert "_VLM_COMPLETE" in text
    assert f"{shell}_complete" in text


def test_completion_of_an_unknown_shell_exits_with_2(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "'bash'" in capsys.readouterr().err
