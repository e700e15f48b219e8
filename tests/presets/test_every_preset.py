"""Every preset of the catalogue: it is valid, it can be rehearsed, and one of each signature of parts learns and resumes."""

import json
import math

import pytest

from tests.presets.stand_ins import begin, digest, quiet, resumed_after, small, steps_of_stages
from vlm.config.catalogue import list_presets
from vlm.training.directory import RunDirectory
from vlm.training.preset import load_preset, stages_of
from vlm.training.rehearsal import plans_of
from vlm.training.run import Run

KEYS = [entry.key for entry in list_presets()]
SIGNATURES = {
    "limber": "a linear connector alone",
    "infmllm": "pooled positions, a mixture, three stages",
    "povid": "preferences, adapters that are merged, live companions, noisy pictures",
    "llava-kd": "a teacher in two stages of three",
    "debias-lvlm": "a whole model with weights of its own",
    "vlm-tiny": "two parts, two stages",
    "pyramiddrop": "positions dropped between layers",
    "aim": "merged before the decoder and dropped inside it, at inference alone",
    "clip-tiny-tome": "tokens merged inside the tower",
    "xclip": "clips: frames that exchange messages",
    "lora-tiny": "adapters on a dual encoder",
    "sugar": "two inputs compared over the update, with a teacher of both streams, beside adapters",
    "linear-probe": "a head on a frozen tower",
    "swin-v2": "pictures alone: hidden squares, then classes of the model's own",
}
"""Presets that between them have every part, and what each is here for."""


def test_every_signature_names_a_preset():
    assert set(SIGNATURES) <= set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_a_preset_is_valid_and_says_what_it_is(key):
    preset, resolved = load_preset(key)
    assert preset.method.key == key
    assert preset.method.title
    assert preset.method.paper
    assert stages_of(resolved)


@pytest.mark.parametrize("key", KEYS)
def test_a_preset_can_be_rehearsed(key, models, tmp_path):
    preset, resolved = small(key, models)
    run = Run(RunDirectory(tmp_path / "run"), preset, resolved, note=quiet)
    plans = plans_of(run, str(tmp_path))
    assert [plan.stage for plan in plans] == [stage.name for stage in run.stages]
    for plan in plans:
        assert plan.seconds_per_step > 0
        assert (plan.seconds > 0) == (plan.steps > 0)  # a model that is only asked in another way takes no step
        assert 0 < plan.trainable <= plan.parameters


@pytest.mark.parametrize("key", list(SIGNATURES))
def test_a_preset_learns_resumes_with_the_same_bits_and_is_scored(key, models, tmp_path):
    count = len(stages_of(load_preset(key)[1]))
    steps = 3 if count == 1 else 2
    limits = [f"evaluation.tasks.{task.name}.limit=4" for task in load_preset(key)[0].evaluation.tasks if task.name is not None]
    tasks = [] if limits else ["evaluation.tasks=[]"]  # those of a dual encoder have tests of their own
    settings = [*steps_of_stages(key, steps), "train.checkpoint_every=1", "train.keep=0", *limits, *tasks]
    result = begin(tmp_path / "whole", key, models, *settings).train()
    expected = digest(tmp_path / "whole")
    losses = [line["train/loss"] for line in expected[1] if "train/loss" in line]
    assert result.steps == len(losses) == steps * count
    assert all(map(math.isfinite, losses))
    for step in {1, steps * count - 1}:  # inside the first stage and inside the last
        assert resumed_after(tmp_path / "whole", step, tmp_path / f"from-{step}") == expected
    scored = {evaluation["name"] for evaluation in result.evaluations}
    assert scored == ({task.title for task in load_preset(key)[0].evaluation.tasks} if limits else set())
    json.dumps(result.to_json())
