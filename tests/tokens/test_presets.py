"""Claims of the presets that reduce tokens: both arms read as many positions, and differ in which."""

import pytest

from vlm.models import VisionLanguageOptions
from vlm.tokens import TokensOptions
from vlm.workflows.reproduce.claim import claim_of

DEPTH, TOKENS = 4, 64


def read(values):
    """[L] positions of a picture that each layer of vlm-tiny reads."""
    tokens = TokensOptions.model_validate(values["model"]["tokens"])
    return tokens.plan(DEPTH).read(tokens.left(TOKENS), DEPTH)


@pytest.mark.parametrize(
    ("key", "reads"),
    [("aim", [32, 24, 16, 8]), ("fopru", [32] * 4), ("vision-token-search", [64, 40, 18, 5])],
)
def test_arms_read_alike_and_the_gate_reads_all(key, reads):
    claim = claim_of(key)
    assert read(claim.method.values) == reads
    baseline = read(claim.baseline.values)
    assert abs(sum(baseline) - sum(reads)) <= (0 if key != "vision-token-search" else DEPTH)  # a token a layer is floored
    assert claim.baseline.values["model"]["tokens"] != claim.method.values["model"]["tokens"]
    gate = next(arm for arm in claim.arms if arm.name == "gate-0")
    assert read(gate.values) == [TOKENS] * DEPTH
    for arm in claim.arms:  # training reads everything, so the arms are one model asked in different ways
        assert arm.values["model"]["tokens"]["when"] == "inference"


def test_arms_of_merging_remove_as_many_and_the_gate_none():
    claim = claim_of("clip-tiny-tome")
    merges = [arm.values["model"]["vision"]["merge"] for arm in claim.arms]
    assert [merge["remove"]["r"] for merge in merges] == [8, 8, 0]
    assert [merge["match"]["metric"] for merge in merges] == ["keys", "random", "keys"]


def test_a_preset_s_tokens_are_those_of_its_model():
    values = claim_of("aim").method.values["model"]
    language = {"width": 16, "depth": DEPTH, "heads": 2, "ffn_width": 16, "length": 192}
    tower = {"width": 16, "depth": 4, "heads": 2, "image_size": 64, "patch_size": 8}
    options = VisionLanguageOptions.model_validate(values | {"language": language, "towers": {"main": tower}})
    assert options.tokens.keep.kind == "linear"
