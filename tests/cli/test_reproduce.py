"""`vlm reproduce` at the shell: exit codes, dry run, JSON, resumption."""

import json
import sys

import pytest

from vlm.cli import main as cli_main

TOY = """\
schema = 1
extends = "siglip-tiny"

[method]
key = "toy"

[claim]
data = "scenes:?n=200&size=16"
test = "scenes:?n=40&size=16&seed=1"
margin = 1.0
tune = { factors = [1.0] }

[claim.overrides]
model.embed_dim = 32
model.vision = { width = 32, depth = 1, heads = 1, image_size = 16, patch_size = 8 }
model.text = { width = 32, depth = 1, heads = 1, length = 8 }
train = { steps = 2, batch_size = 16 }
scale = { threads = 1 }
"""


@pytest.fixture
def vlm(tmp_path, monkeypatch, capsys):
    """vlm(arguments) -> (exit code, stdout, stderr), in an empty directory that holds toy.toml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.toml").write_text(TOY)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["vlm", *words])
        code = cli_main.main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_it_prints_the_verdict_as_json_and_goes_on_where_it_was(vlm, tmp_path):
    code, out, err = vlm("reproduce", "toy.toml", "--seeds", "2", "--json")
    assert code == 0
    answer = json.loads(out)
    assert answer["verdict"] in ("holds", "fails", "not seen", "underpowered")
    assert answer["margin"] == 1.0
    assert {"mean", "values"} <= set(answer["method"])
    assert {"mean", "values"} <= set(answer["baseline"])
    assert {"mean", "lower", "upper"} <= set(answer["difference"])
    assert answer["seeds"] == [0, 1]
    assert answer["command"] == "vlm reproduce toy.toml --seeds 2"
    assert err.count("training") == 4
    code, out, err = vlm("reproduce", "toy.toml", "--seeds", "2")
    assert code == 0
    assert "training" not in err
    assert "95 % t-interval over 2 seeds" in out
    assert (tmp_path / "results" / "toy.json").is_file()


def test_a_dry_run_lists_the_units_and_trains_none(vlm, tmp_path):
    code, out, _ = vlm("reproduce", "toy.toml", "--seeds", "2", "--dry-run", "--json")
    assert code == 0
    units = json.loads(out)["units"]
    assert [unit["state"] for unit in units] == ["to do"] * 4
    assert len({unit["key"] for unit in units}) == 4
    assert not (tmp_path / "results").exists()


def test_absent_real_data_leave_with_3_and_name_the_way_out(vlm):
    code, out, err = vlm("reproduce", "siglip-tiny")
    assert code == 3
    assert "data/emoji/train-*.tar" in err
    assert "--data builtin" in err
    assert not out


def test_a_plan_on_drawn_scenes_needs_no_files(vlm):
    code, out, _ = vlm("reproduce", "siglip-tiny", "--data", "builtin", "--seeds", "1", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["units"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name one preset"),
        (("toy.toml", "--all"), "name one preset"),
        (("clip-tiny",), "makes no claim"),
        (("siglip-tinny",), "siglip-tiny"),
        (("toy.toml", "--budget", "soon"), "no length of time"),
    ],
)
def test_a_wrong_request_leaves_with_2(vlm, words, message):
    code, _, err = vlm("reproduce", *words)
    assert code == 2
    assert message in err


def test_a_budget_that_is_spent_leaves_what_is_done(vlm):
    code, _, err = vlm("reproduce", "toy.toml", "--seeds", "2", "--budget", "1s")
    assert code == 1
    assert "stopped" in err
    assert "budget" in err
