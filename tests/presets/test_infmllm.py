"""infmllm at the size of a test: what each stage opens, how many positions a picture takes, what is mixed."""

import pytest
import torch

from tests.presets.stand_ins import assembled, begin
from vlm.data.loader import open_split
from vlm.models import load_model
from vlm.schedules import rate_factor
from vlm.training.preset import load_preset, stages_of
from vlm.workflows.carve import Carving
from vlm.workflows.reproduce.claim import claim_of, settled


def of_language(name):
    return name.startswith("language.")


def test_infmllm_second_stage_trains_exactly_q_and_v_of_the_language_model(models, tmp_path):
    steps = ["stages.align.train.steps=0", "stages.multitask.train.steps=2", "stages.instruct.train.steps=0", "evaluation.tasks=[]"]
    run = begin(tmp_path / "run", "infmllm", models, *steps)
    with assembled(run) as parts:
        before = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    with assembled(run, 1) as parts:
        open_ = {name for name, p in parts.model.named_parameters() if p.requires_grad}
        assert not [name for name in open_ if ".lora_" in name]
    depth = load_model(models["lm-tiny"]).options.depth
    expected = {f"language.trunk.blocks.{k}.attention.{which}.weight" for k in range(depth) for which in "qv"}
    assert set(filter(of_language, open_)) == expected
    run.train()
    after = load_model(tmp_path / "run").state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert set(filter(of_language, changed)) == expected
    assert {name.split(".")[0] for name in changed} == {"connector", "language"}


@pytest.mark.parametrize(("stage", "groups"), [(0, {"connector"}), (2, {"connector", "language"})])
def test_infmllm_other_stages_open_whole_parts(models, tmp_path, stage, groups):
    with assembled(begin(tmp_path / "run", "infmllm", models), stage) as parts:
        open_ = {name for name, p in parts.model.named_parameters() if p.requires_grad}
        assert {name.split(".")[0] for name in open_} == groups
        assert open_ == {name for name, _ in parts.model.named_parameters() if name.split(".")[0] in groups}


def test_infmllm_pool_and_resampler_take_as_many_positions(models, tmp_path):
    claim = claim_of("infmllm")
    method, baseline = (settled(arm.values)[0].model.connector for arm in claim.arms)
    assert method.pre.grid[0] * method.pre.grid[1] == baseline.latents == 16
    with assembled(begin(tmp_path / "run", "infmllm", models)) as parts:
        assert parts.model.picture_positions == 16


def test_infmllm_the_rate_ends_on_its_floor():
    stage = stages_of(load_preset("infmllm")[1])[0]
    settings = {"batch_size": 64, "samples": 40_000}
    assert rate_factor(stage.schedule, 10**6, 10**6, **settings) == pytest.approx(0.1)
    half = 0.5 * 10**6 * (1 + 0.05)  # in the middle of what follows the warm-up
    assert rate_factor(stage.schedule, round(half), 10**6, **settings) == pytest.approx((1 - 0.1) * 0.5 + 0.1)


def test_infmllm_captions_questions_and_boxes_come_in_their_shares(models, tmp_path):
    with assembled(begin(tmp_path / "run", "infmllm", models, "stages.multitask.train.batch_size=64"), 1) as parts:
        keys = next(parts.loader).keys
    counts = {name: sum(key.startswith(f"{name}/") for key in keys) for name in ("captions", "questions", "grounding")}
    assert counts == {"captions": 16, "questions": 32, "grounding": 16}


def test_infmllm_its_claim_mixes_parts_without_the_held_out_concepts(models, tmp_path):
    run = begin(tmp_path / "run", "infmllm", models)
    mixture = Carving(("concept",), 0.3, held_out=False).of(open_split(run.stages[1].data, "train"))
    with assembled(run, 1) as parts:
        loader = run._loader(run.stages[1], parts.model, mixture)
    with loader:
        keys = [key for _ in range(8) for key in next(loader).keys]
    assert {key.split("/")[0] for key in keys} == {"captions", "questions", "grounding"}
    held = Carving(("concept",), 0.3, held_out=True).of(mixture.sources[0].whole)
    assert not {key.split("/", 1)[1] for key in keys} & {held.key(i) for i in range(len(held))}
