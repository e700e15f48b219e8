"""Presets that are named as models: trained once, kept by content, found again, told by a dry run."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from vlm.cli import training_job
from vlm.config import catalogue, files
from vlm.config.errors import ExitCode, RequestError
from vlm.models import load_model
from vlm.training.preset import load_preset
from vlm.training.run import Run
from vlm.training.trainer import Interrupted, Trainer
from vlm.workflows.bases import BaseStore, named_bases, own_units, with_bases
from vlm.workflows.reproduce.unit import base_names, with_models

TOY = (Path(__file__).parents[1] / "training" / "toy.toml").read_text()
DISTILL = '\n[[objectives]]\nname = "distill"\nkind = "distill"\n'

PRESETS = {
    "tiny": TOY.replace("steps = 12", "steps = 3\nseed = 4").replace('key = "toy"', 'key = "tiny"'),
    "student": 'schema = 1\nextends = "tiny"\n[method]\nkey = "student"\ncommand = "distill"\n[train]\nsteps = 2\n'
    + '[companions.teacher]\nsource = "tiny"\n' + DISTILL,
    "grandchild": 'schema = 1\nextends = "tiny"\n[method]\nkey = "grandchild"\ncommand = "distill"\n[train]\nsteps = 2\n'
    + '[companions.teacher]\nsource = "student"\n' + DISTILL,
    "whole": 'schema = 1\nextends = "tiny"\n[method]\nkey = "whole"\n[train]\nsteps = 2\n[start.parts]\nvision = "tiny"\n',
    "loop-a": 'schema = 1\nextends = "tiny"\n[method]\nkey = "loop-a"\n[start.parts]\nvision = "loop-b"\n',
    "loop-b": 'schema = 1\nextends = "tiny"\n[method]\nkey = "loop-b"\n[start.parts]\nvision = "loop-a"\n',
    "staged": 'schema = 1\nextends = "tiny"\n[method]\nkey = "staged"\n[[stages]]\nname = "one"\ntrain = { steps = 2 }\n'
    + '[[stages]]\nname = "two"\ntrain = { steps = 2 }\ncompanions = { teacher = { source = "tiny" } }\n'
    + 'objectives = [{ name = "distill", kind = "distill" }]\n',
}  # fmt: skip


@pytest.fixture(autouse=True)
def presets(tmp_path, monkeypatch):
    """A catalogue of presets that train in a second, and an empty folder to work in."""
    folder = tmp_path / "presets"
    folder.mkdir()
    for key, text in PRESETS.items():
        (folder / f"{key}.toml").write_text(text)
    for module in (catalogue, files):
        monkeypatch.setattr(module, "packaged_directory", lambda: folder)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return folder


@pytest.fixture
def notes():
    return []


@pytest.fixture
def store(notes):
    return BaseStore(note=notes.append)


def values_of(name, *overrides):
    return load_preset(name, overrides)[1].values


def command(capsys, *words):
    """(exit code, what was printed, what was told) of a training command."""
    job = dict.fromkeys(("preset", "data", "val", "output", "model", "teacher", "processes", "resume"))
    job |= {"overrides": ("scale.threads=1",), "strict": False, "dry_run": False, "as_json": True, "no_report": True}
    code = training_job.run(training_job.Job(**job | dict(words)), [])
    told = capsys.readouterr()
    return code, json.loads(told.out) if told.out.strip() else None, told.err


def test_where_a_preset_names_models():
    values = {
        "start": {"model": "a", "parts": {"vision": "b", "text": "c"}},
        "companions": {"teacher": {"source": "d"}, "copy": {"source": "model"}, "old": {"source": "stage:x"}},
        "stages": [{"name": "x", "companions": "!delete"}, {"name": "y", "start": {"model": "none"}, "companions": {"t": {"source": "e"}}}],
    }
    assert set(base_names(values).values()) == {"a", "b", "c", "d", "e"}
    assert base_names(values)["stages", 1, "companions", "t", "source"] == "e"
    placed = with_models(values, {"b": Path("B"), "e": Path("E")})
    assert placed["start"]["parts"] == {"vision": "B", "text": "c"}
    assert placed["stages"][1]["companions"]["t"]["source"] == "E"
    assert values["stages"][1]["companions"]["t"]["source"] == "e"
    assert placed["companions"] == values["companions"]


def test_a_base_is_trained_once_by_its_own_settings_and_kept_by_content(store, notes):
    units = own_units(values_of("whole"))
    place = store.ready(units)["tiny"]
    assert place.parent == Path("runs/bases")
    assert place.name.startswith("tiny-")
    assert place.name == f"tiny-{units['tiny'].key[:12]}"
    assert load_preset(str(place))[0].train.steps == 3
    assert any("tiny" in note and str(place) in note for note in notes)
    plain, resolved = load_preset("tiny")
    Run.begin(Path("alone"), plain, resolved, note=lambda text: None).train()
    given, alone = load_model(place).state_dict(), load_model("alone").state_dict()
    assert all(torch.equal(given[name], tensor) for name, tensor in alone.items())
    before, count = (place / "model" / "model.safetensors").stat().st_mtime_ns, len(notes)
    assert store.ready(own_units(values_of("student"))) == {"tiny": place}
    assert (place / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert len(notes) == count


def test_another_setting_of_the_base_is_another_base(store, presets):
    first = store.place(own_units(values_of("whole"))["tiny"])
    (presets / "tiny.toml").write_text(PRESETS["tiny"].replace("steps = 3", "steps = 4"))
    assert store.place(own_units(values_of("whole"))["tiny"]) != first
    (presets / "tiny.toml").write_text(PRESETS["tiny"].replace("n=40", "n=41"))  # evaluation makes no weights
    assert store.place(own_units(values_of("whole"))["tiny"]) == first


def test_a_directory_of_that_name_comes_first():
    Path("tiny").mkdir()
    assert named_bases(values_of("whole")) == []
    assert named_bases(values_of("grandchild")) == ["student"]
    Path("tiny").rmdir()
    assert named_bases(values_of("whole")) == ["tiny"]
    assert named_bases(values_of("whole", 'start.parts.vision="no-such-preset"')) == []


def test_bases_that_need_each_other_are_refused():
    with pytest.raises(RequestError, match="bases need each other: loop-b -> loop-a -> loop-b"):
        own_units(values_of("loop-a"))


def test_a_base_of_a_base_is_made_first(store):
    units = own_units(values_of("grandchild"))
    assert set(units["student"].bases) == {"tiny"}
    store.ready(units)
    assert sorted(path.name.rpartition("-")[0] for path in Path("runs/bases").iterdir() if path.is_dir()) == ["student", "tiny"]
    base = load_preset(str(store.place(units["student"])))[0]
    assert base.companions["teacher"].source == str(store.place(units["student"].bases["tiny"]))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves metrics.jsonl open, as if killed
def test_an_interrupted_base_goes_on(store, notes, monkeypatch, presets):
    (presets / "tiny.toml").write_text(PRESETS["tiny"].replace("checkpoint_every = 4", "checkpoint_every = 1"))
    units = own_units(values_of("whole"))
    save = Trainer.save

    def dying(self):
        save(self)
        raise Interrupted(ExitCode.INTERRUPTED)

    monkeypatch.setattr(Trainer, "save", dying)
    with pytest.raises(Interrupted):
        store.ready(units)
    place = store.place(units["tiny"])
    assert not (place / "model").exists()
    monkeypatch.setattr(Trainer, "save", save)
    assert store.ready(units) == {"tiny": place}
    assert any("continuing from" in note for note in notes)
    steps = [json.loads(line)["step"] for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_the_command_trains_the_base_says_so_and_goes_on(capsys):
    code, answer, told = command(capsys, ("command", "pretrain"), ("preset", "whole"))
    assert code is ExitCode.DONE
    assert "base tiny: trained once, kept in runs/bases/tiny-" in told
    [base] = [path for path in Path("runs/bases").iterdir() if path.is_dir()]
    settled = load_preset(answer["output"])[0]
    assert settled.start.parts == {"vision": str(base)}
    _, _, told = command(capsys, ("command", "distill"), ("preset", "student"))
    assert "trained once" not in told
    assert load_preset("runs/student")[0].companions["teacher"].source == str(base)
    shutil.rmtree(base)
    shutil.rmtree(Path(answer["output"]) / "model")
    code, _, told = command(capsys, ("command", "pretrain"), ("resume", Path(answer["output"])), ("overrides", ()))
    assert code is ExitCode.DONE  # the finished run holds all it needs
    assert "base tiny" not in told


def test_a_used_output_is_refused_before_a_base_is_trained(capsys):
    (Path("runs") / "whole").mkdir(parents=True)
    (Path("runs") / "whole" / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="not empty"):
        command(capsys, ("command", "pretrain"), ("preset", "whole"))
    assert not Path("runs/bases").exists()


def test_a_companion_of_a_stage_may_be_a_base(capsys):
    code, answer, told = command(capsys, ("command", "pretrain"), ("preset", "staged"))
    assert code is ExitCode.DONE
    assert "base tiny: trained once" in told
    assert answer["steps"] == 4


def test_the_command_names_the_interruption_of_a_base(monkeypatch, capsys):
    def dying(self):
        raise Interrupted(ExitCode.TERMINATED)

    monkeypatch.setattr(Trainer, "run", dying)
    code, _, told = command(capsys, ("command", "pretrain"), ("preset", "whole"))
    assert code is ExitCode.TERMINATED
    assert "while a base was trained" in told


def test_a_dry_run_tells_the_bases_and_trains_nothing(capsys):
    arguments = (("command", "distill"), ("preset", "grandchild"), ("dry_run", True))
    code, answer, _ = command(capsys, *arguments)
    assert code is ExitCode.DONE
    assert [(base["preset"], base["trained"]) for base in answer["bases"]] == [("tiny", False), ("student", False)]
    assert all(base["seconds"] > 0 for base in answer["bases"])
    assert [stage["steps"] for stage in answer["stages"]] == [2]
    assert answer["stages"][0]["memory"]["companions"] > 0
    assert not Path("runs").exists()
    BaseStore(note=lambda text: None).ready(own_units(values_of("student")))
    _, answer, _ = command(capsys, *arguments)
    told = [(base["preset"], base["trained"], base["seconds"] > 0) for base in answer["bases"]]
    assert told == [("tiny", True, False), ("student", False, True)]
    _, answer, _ = command(capsys, ("command", "pretrain"), ("preset", "tiny"), ("dry_run", True))
    assert answer["bases"] == []


def test_a_dry_run_for_a_person(capsys):
    job = dict.fromkeys(("data", "val", "output", "model", "teacher", "processes", "resume"))
    job |= {"overrides": ("scale.threads=1",), "strict": False, "dry_run": True, "as_json": False, "no_report": True}
    training_job.run(training_job.Job(command="pretrain", preset="whole", **job), [])
    assert "base tiny: would be trained first, once: about" in capsys.readouterr().out


def test_a_model_that_is_given_is_the_whole_model_and_no_base_is_laid_over_it(capsys):
    plain, resolved = load_preset("tiny", ("train.seed=9", "train.steps=1"))
    Run.begin(Path("other"), plain, resolved, note=lambda text: None).train()
    words = (("command", "pretrain"), ("preset", "whole"), ("model", "other"), ("output", Path("again")))
    code, answer, _ = command(capsys, *words, ("overrides", ("scale.threads=1", "train.steps=0")))
    assert (code, answer["steps"]) == (ExitCode.DONE, 0)
    assert not Path("runs/bases").exists()
    given, found = load_model("other").state_dict(), load_model("again").state_dict()
    assert all(torch.equal(given[name], tensor) for name, tensor in found.items())


def test_a_finetuning_preset_in_parts_of_one_model_gets_them_all_from_the_one_that_is_given(presets):
    (presets / "drop.toml").write_text(
        'schema = 1\nextends = "tiny"\n[method]\nkey = "drop"\ncommand = "finetune"\n[start.parts]\nvision = "tiny"\n"text.trunk" = "tiny"\n'
    )
    job = dict.fromkeys(("data", "val", "output", "teacher", "processes", "resume", "strict", "dry_run", "as_json", "no_report"))
    made = training_job.Job(command="finetune", preset="drop", model="dir", overrides=("train.steps=1",), **job)
    assert training_job.overrides_of(made, "drop") == ['start.parts."vision"="dir"', 'start.parts."text.trunk"="dir"', "train.steps=1"]
    start = load_preset("drop", training_job.overrides_of(made, "drop"))[0].start
    assert (start.model, start.parts) == (None, {"vision": "dir", "text.trunk": "dir"})
    said = training_job.Job(command="finetune", preset="drop", model="dir", overrides=('start.parts.vision="mine"',), **job)
    assert training_job.overrides_of(said, "drop") == said.all_overrides()


def test_the_origins_of_a_preset_stay_when_bases_take_their_places():
    preset, resolved = load_preset("whole")
    placed = with_bases(resolved, {"tiny": Path("runs/bases/tiny-0")})
    assert placed.values["start"]["parts"]["vision"] == "runs/bases/tiny-0"
    assert placed.origins.keys() == resolved.origins.keys()
    assert placed.origins["train", "steps"] == resolved.origins["train", "steps"]
    assert preset.start.parts["vision"] == "tiny"
