"""povid at the size of a test: what its stages begin with, what learns, and what its baseline is."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.presets.stand_ins import assembled, begin
from vlm.models import load_model
from vlm.training.preset import load_preset, stages_of
from vlm.workflows.reproduce.claim import claim_of, settled


def lines(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


STEPS = ["stages.describe.train.steps=1", "stages.text-pref.train.steps=2", "stages.noise-pref.train.steps=2", "evaluation.tasks=[]"]


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_povid_first_loss_is_ln_2_in_both_stages(models, tmp_path, precision):
    """Adapters begin at zero, again in the second stage, whose reference is the first one's outcome."""
    begin(tmp_path / "run", "povid", models, *STEPS, f"train.precision={precision}", "optimizer.lr=0.05").train()
    _, text, moved, noise, _ = lines(tmp_path / "run")
    assert text["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert text["train/hallucinated/margin"] == 0
    assert moved["train/loss"] != pytest.approx(math.log(2), abs=1e-4)  # so that the stage after it begins elsewhere
    assert noise["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    for term in ("hallucinated", "own"):
        assert noise[f"train/{term}"] == pytest.approx(math.log(2), abs=1e-6)
        assert noise[f"train/{term}/margin"] == 0


def test_povid_only_adapters_of_the_language_model_learn_from_preferences(models, tmp_path):
    run = begin(tmp_path / "run", "povid", models)
    for stage in (1, 2):
        with assembled(run, stage) as parts:
            names = [name for name, p in parts.model.named_parameters() if p.requires_grad]
            assert names
            assert all(name.startswith("language.") and ".lora_" in name for name in names)


def test_povid_the_noisy_picture_differs_and_the_clean_one_is_kept(models, tmp_path):
    run = begin(tmp_path / "run", "povid", models)
    with assembled(run, 2) as parts:
        batch = next(parts.loader)
    clean, noisy = batch["image"].values.float(), batch["image.noisy"].values.float()
    assert clean.shape == noisy.shape
    assert (clean - noisy).abs().mean() > 10  # of 255; the noise has a deviation of half the range
    assert not torch.equal(batch["answer.preferred"].values, batch["answer.rejected"].values)


def test_povid_the_preset_of_the_design_is_one():
    """At the published size it says the same: the schema reads it, and its stages differ from those here in size alone."""
    design = Path(__file__).parents[2] / "docs/design/presets/povid.toml"
    published, here = stages_of(load_preset(str(design))[1]), stages_of(load_preset("povid")[1])[1:]
    assert [stage.name for stage in published] == [stage.name for stage in here]
    for one, other in zip(published, here):
        assert one.objectives == other.objectives
        assert one.companions == other.companions
        assert one.data.noises == other.data.noises
        assert one.tuning.lora.target == other.tuning.lora.target


def test_povid_its_baseline_is_what_the_preference_stages_start_from(models, tmp_path):
    claim = claim_of("povid")
    stages = {arm.name: {s["name"]: s["train"]["steps"] for s in arm.values["stages"]} for arm in claim.arms}
    assert stages["povid"] == {"describe": 60, "text-pref": 100, "noise-pref": 60}
    assert stages["povid (ablated)"] == {"describe": 60, "text-pref": 0, "noise-pref": 0}
    assert all(settled(arm.values)[0].start.model == "vlm-tiny" for arm in claim.arms)
    none = ["stages.text-pref.train.steps=0", "stages.noise-pref.train.steps=0", "evaluation.tasks=[]"]
    begin(tmp_path / "base", "povid", models, "stages.describe.train.steps=2", *none).train()
    alone = ["stages.text-pref=!delete", "stages.noise-pref=!delete", "evaluation.tasks=[]"]
    begin(tmp_path / "alone", "povid", models, "stages.describe.train.steps=2", *alone).train()
    based, described = load_model(tmp_path / "base").state_dict(), load_model(tmp_path / "alone").state_dict()
    assert based.keys() == described.keys()
    assert all(torch.equal(based[name], described[name]) for name in based)
