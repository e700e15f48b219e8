"""`vlm runs` reads run directories, whole, half-written and broken ones."""

import json

import pytest

from vlm.cli.main import main


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Writes run directories below runs/."""
    monkeypatch.chdir(tmp_path)

    def write(name, lines, *, lr="1e-3", finished=True, tail=""):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "preset.toml").write_text(
            f'schema = 1\n[method]\nkey = "toy"\n[optimizer]\nlr = {lr}\n[[objectives]]\nname = "c"\nweight = 1\n'
        )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
        (folder / "environment.json").write_text('{"started": "2026-01-01T00:00:00+0000"}')
        if finished:
            (folder / "model").mkdir()
        return folder

    return write


def result(capsys, *words):
    code = main(list(words))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured


LINES = [
    {"step": 1, "time": 1.5, "train/loss": 3.0, "perf/samples_per_s": 10},
    {"step": 2, "time": 62.0, "train/loss": 2.0, "eval/retrieval/r@1": 40.0},
    {"step": 3, "time": 63.0, "train/loss": 2.5},
]


def test_list_says_preset_step_state_and_last_metrics(runs, capsys):
    runs("a", LINES)
    runs("group/b", LINES[:1], finished=False)
    first, second = json.loads(result(capsys, "runs", "list", "--json").out)
    assert first == {
        "path": "runs/a",
        "preset": "toy",
        "step": 3,
        "state": "finished",
        "seconds": 63.0,
        "started": "2026-01-01T00:00:00+0000",
        "metrics": {"train/loss": 2.5, "perf/samples_per_s": 10, "eval/retrieval/r@1": 40.0},
        "problem": None,
    }
    assert (second["path"], second["state"], second["step"]) == ("runs/group/b", "no checkpoint", 1)
    text = result(capsys, "runs", "list", "runs").out
    assert "0:01:03" in text
    assert "eval/retrieval/r@1 40" in text


def test_a_run_with_a_checkpoint_is_resumable(runs, capsys):
    (runs("a", LINES, finished=False) / "checkpoints/step-2").mkdir(parents=True)
    assert json.loads(result(capsys, "runs", "list", "runs/a", "--json").out)[0]["state"] == "resumable"


def test_a_line_cut_by_a_crash_is_not_read(runs, capsys):
    runs("a", LINES, tail='{"step": 4, "train/lo')
    run = json.loads(result(capsys, "runs", "list", "--json").out)[0]
    assert (run["step"], run["problem"]) == (3, None)


def test_a_broken_line_is_named_and_the_rest_is_read(runs, capsys):
    folder = runs("a", LINES[:1])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n[1]\n" + json.dumps(LINES[2]) + "\n")
    captured = result(capsys, "runs", "list", "--json")
    assert json.loads(captured.out)[0]["step"] == 3
    assert "metrics.jsonl:2: not a JSON object (2 lines)" in captured.err


def test_a_broken_preset_is_named_with_its_place(runs, capsys):
    (runs("a", LINES) / "preset.toml").write_text("a = \n")
    assert "runs/a/preset.toml:1:5" in result(capsys, "runs", "list").err


def test_compare_shows_only_settings_that_differ_and_every_metric_of_the_model(runs, capsys):
    runs("a", LINES)
    runs("b", LINES[:2], lr="3e-4")
    compared = json.loads(result(capsys, "runs", "compare", "runs/a", "runs/b", "--json").out)
    assert compared["settings"] == {"optimizer.lr": [1e-3, 3e-4]}
    assert set(compared["metrics"]) == {"train/loss", "eval/retrieval/r@1"}
    assert compared["metrics"]["train/loss"] == [
        {"last": 2.5, "step": 3, "min": 2.0, "max": 3.0},
        {"last": 2.0, "step": 2, "min": 2.0, "max": 3.0},
    ]
    text = result(capsys, "runs", "compare", "runs", "--metric", "train/").out
    assert "optimizer.lr" in text
    assert "eval/" not in text


def test_a_loss_that_is_not_finite_is_shown_as_null(runs, capsys):
    runs("a", [{"step": 1, "train/loss": float("nan")}])
    runs("b", LINES)
    compared = json.loads(result(capsys, "runs", "compare", "runs", "--json").out)
    assert compared["metrics"]["train/loss"][0] == {"last": None, "step": 1, "min": None, "max": None}


def test_a_comparison_of_one_run_and_a_missing_folder_are_errors(runs, capsys, tmp_path):
    runs("a", LINES)
    assert main(["runs", "compare", "runs/a"]) == 2
    assert "at least two runs" in capsys.readouterr().err
    (tmp_path / "else").mkdir()
    assert main(["runs", "compare", "runs/a", str(tmp_path / "else")]) == 3
    assert "is no run and holds none" in capsys.readouterr().err
    assert main(["runs", "list", "nowhere"]) == 3
    assert "nowhere: there is no such directory" in capsys.readouterr().err
