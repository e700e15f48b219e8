"""lm-infinite and budget-longformer at the size of a test: both arms of their claims learn, resume and are scored."""

import math

import pytest

from tests.presets.stand_ins import begin, digest, quiet, resumed_after, small
from tests.presets.test_claims import PART, shrunk
from vlm.config.load import merge_tables
from vlm.models.attending import AttendingTrunk
from vlm.training.preset import load_preset
from vlm.workflows.reproduce.claim import claim_of
from vlm.workflows.reproduce.unit import Unit, train_unit

KEYS = ("lm-infinite", "budget-longformer")
SMALL = {"model": {"width": 32, "depth": 2, "heads": 2, "ffn_width": 48}, "tokenizer": {"vocab_size": 300},
         "data": {"source": "scenes:?n=96"}}


@pytest.mark.parametrize("key", KEYS)
def test_it_learns_and_resumes_with_the_same_bits(key, models, tmp_path):
    settings = ["train.steps=3", "train.checkpoint_every=1", "train.keep=0", "evaluation.tasks=[]"]
    begin(tmp_path / "whole", key, models, *settings).train()
    expected = digest(tmp_path / "whole")
    losses = [line["train/loss"] for line in expected[1] if "train/loss" in line]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert resumed_after(tmp_path / "whole", 1, tmp_path / "again") == expected


@pytest.mark.parametrize("key", KEYS)
def test_every_arm_gives_the_figure_that_the_claim_reads(key, models, tmp_path):
    claim = claim_of(key)
    tasks = tuple(task.model_copy(update={"limit": 40, "resamples": 100}) for task in claim.tasks)
    for number, arm in enumerate(claim.arms):
        values = merge_tables(shrunk(arm.values), SMALL | ({"model": SMALL["model"] | {"kv_heads": 1}} if key == "lm-infinite" else {}))
        made = train_unit(Unit(arm.name, "tune", 0, values, PART, "scenes:?n=60&split=test", PART, tasks), tmp_path / str(number), models, note=quiet)
        assert math.isfinite(made["figures"][claim.metric_of(arm.name)])


def test_core_lm_infinite_training_pieces_never_reach_beyond_the_window(models):
    preset, _ = small("lm-infinite", models)
    attention = preset.model.attention
    assert attention.distance_cap == attention.near.window == preset.data.packer.length
    assert preset.evaluation.tasks[0].length > 4 * attention.near.window
    model = preset.model.filled(type("V", (), {"size": 300})()).trunk()
    assert model.attention.cache == "rolling"


def test_core_budget_longformer_preset_is_an_encoder_with_global_projections():
    preset, _ = load_preset("budget-longformer")
    assert not preset.model.causal
    assert preset.model.attention.global_projections
    assert preset.objectives[0].balance == 50
    assert AttendingTrunk(preset.model.trunk()).blocks[0].global_attention is not None
