"""hip and infllm: a trained language model asked in another way, and what their claims compare."""

import json

import pytest
import torch

from tests.presets.stand_ins import begin
from vlm.attention import seen_keys
from vlm.models import load_model
from vlm.training.preset import Stage, load_preset
from vlm.workflows.reproduce.claim import claim_of

KEYS = ("hip", "infllm")


@pytest.mark.parametrize("key", KEYS)
def test_hip_and_infllm_learn_nothing_and_are_scored_as_they_are_asked(key, models, tmp_path):
    overrides = ["evaluation.tasks=[{task='perplexity', limit=6, resamples=100}]"]
    result = begin(tmp_path / "run", key, models, *overrides).train()
    assert result.steps == 0
    given, own = load_model(models["lm-tiny"]), load_model(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(given.state_dict().values(), own.state_dict().values(), strict=True))
    settings = load_preset(key)[0].start.settings
    assert own.options.length == settings["length"] > given.options.length == 256
    assert own.options.attention.model_dump().items() >= settings["attention"].items()
    assert own.options.attention.when == "inference"
    [evaluation] = result.evaluations
    assert evaluation["metrics"]["bits_per_character"] > 0
    json.dumps(result.to_json())


@pytest.mark.parametrize("key", KEYS)
def test_core_hip_and_core_infllm_both_arms_see_as_many_keys_and_one_of_them_chooses(key):
    claim = claim_of(key)
    arms = {arm.name: arm.values["start"]["settings"] for arm in claim.arms}
    method, baseline = (arms[arm.name] for arm in (claim.method, claim.baseline))
    assert method["length"] == baseline["length"]
    base = load_model_options(method), load_model_options(baseline)
    few, window = base
    assert seen_keys(few, 10**6) == seen_keys(window, 10**6) < method["length"]
    chosen = {"hip": lambda o: o.k, "infllm": lambda o: o.topk}[key]
    assert chosen(few) > 0 == chosen(window)
    stages = [Stage.model_validate({"name": "x", **{k: v for k, v in arm.values.items() if k in Stage.model_fields}}) for arm in claim.arms]
    assert stages[0].train == stages[1].train
    assert stages[0].train.steps > 0  # seeds differ by what they learn last


def load_model_options(settings):
    from pydantic import TypeAdapter

    from vlm.attention import DecoderAttention

    return TypeAdapter(DecoderAttention).validate_python(settings["attention"])
