"""A run that was stopped anywhere and resumed ends with the same bits as one that was not."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from vlm.config.errors import DataError, RequestError
from vlm.training.preset import load_preset
from vlm.training.run import Run

TOY = str(Path(__file__).parent / "toy.toml")


@pytest.fixture(autouse=True, scope="module")
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def begin(output, *overrides):
    preset, resolved = load_preset(TOY, ["scale.threads=1", *overrides])
    return Run.begin(output, preset, resolved, note=lambda text: None)


def finish(output):
    return Run.resume(output, note=lambda text: None).train(strict=True)


def digest(output):
    """sha256 of the final weights, and every figure that is no time."""
    weights = hashlib.sha256((output / "model" / "model.safetensors").read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return weights, [{k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")} for line in lines]


SETTINGS = {
    "plain": [],
    "workers": ["data.workers=2"],
    "accumulate": ["train.accumulate=3"],
    "groups": ["objectives.contrastive.targets=groups"],
    "sigmoid": ["objectives.contrastive.form=sigmoid", "objectives.contrastive.temperature=own"],
    "average": ["train.average=0.9", "train.clip=0.5"],
    "augment": ["data.image.augment=random-resized-crop", "data.captions={kind=\"random\"}"],
    "lora": ["tuning.lora={r=2}"],
    "momentum": [
        'companions.teacher={source="model", update={kind="ema", decay=0.9}}',
        'objectives=[{name="contrastive", kind="contrastive"}, {name="distill", kind="distill"}]',
    ],
    "frozen-copy": [
        'companions.teacher={source="model"}',
        'objectives=[{name="contrastive", kind="contrastive"}, {name="distill", kind="distill"}]',
    ],
}


@pytest.mark.parametrize("settings", list(SETTINGS.values()), ids=list(SETTINGS))
def test_resume_from_every_checkpoint_is_bit_exact(tmp_path, settings):
    begin(tmp_path / "whole", *settings).train()
    expected = digest(tmp_path / "whole")
    assert len(expected[1]) == 12
    for step in (4, 8, 12):
        work = tmp_path / "work"
        shutil.copytree(tmp_path / "whole", work)
        shutil.rmtree(work / "model")
        for path in (work / "checkpoints").iterdir():
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
        finish(work)
        assert digest(work) == expected, f"from step {step}"
        shutil.rmtree(work)


def test_resume_without_any_checkpoint_starts_again_with_the_same_bits(tmp_path):
    begin(tmp_path / "whole").train()
    work = tmp_path / "work"
    shutil.copytree(tmp_path / "whole", work)
    for name in ("checkpoints", "model", "architecture"):
        shutil.rmtree(work / name)
    finish(work)
    assert digest(work) == digest(tmp_path / "whole")


def test_stages_hand_over_weights_and_resume_inside_each(tmp_path):
    stages = 'stages=[{name="first", train={steps=4}}, {name="second", train={steps=6}, optimizer={lr=1e-4}, tuning={freeze=["vision.*"]}}]'
    begin(tmp_path / "whole", stages, "train.checkpoint_every=2").train()
    expected = digest(tmp_path / "whole")
    assert len(expected[1]) == 10
    for step in (2, 6, 8):
        work = tmp_path / "work"
        shutil.copytree(tmp_path / "whole", work)
        for path in (work / "checkpoints").iterdir():
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
        finish(work)
        assert digest(work) == expected, f"from step {step}"
        shutil.rmtree(work)


def test_accumulation_gives_the_same_losses(tmp_path):
    begin(tmp_path / "one", "train.steps=6").train()
    begin(tmp_path / "four", "train.steps=6", "train.accumulate=4").train()
    first, second = (digest(tmp_path / name)[1] for name in ("one", "four"))
    for a, b in zip(first, second, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-5)


def test_an_output_that_holds_something_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="not empty") as caught:
        begin(tmp_path / "run")
    assert caught.value.remedy == "choose another --output"  # there is no run to continue
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    (tmp_path / "run" / "preset.toml").write_text("schema = 1\n")
    with pytest.raises(RequestError, match=r"not empty[\s\S]*--resume"):
        begin(tmp_path / "run")


def test_a_run_that_cannot_begin_leaves_nothing_behind(tmp_path):
    run = begin(tmp_path / "run", 'data.source="/no/such/*.tar"')
    with pytest.raises(DataError):
        run.train()
    assert not (tmp_path / "run").exists()
