"""MixStyle: pictures with the feature statistics of others."""

import pytest
import torch

from tests.objectives.test_contrastive import encoder, pairs
from vlm.models import DualEncoderOptions
from vlm.models.mix_style import MixStyleOptions, drawn_mix, mix_statistics
from vlm.objectives import BuildContext, ContrastiveOptions
from vlm.training.companions import Companions
from vlm.training.engine import Clock, Engine, Weighted
from vlm.types import SingleProcess


def features(b=5, n=7, c=4):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(b, n, c, generator=generator) * torch.arange(1, b + 1)[:, None, None] + 3


def test_syvic_mixing_with_lambda_1_is_the_identity():
    x, order = features(), torch.tensor([1, 2, 3, 4, 0])
    assert torch.equal(mix_statistics(x, order, torch.ones(5)), x)
    torch.testing.assert_close(mix_statistics(x, torch.arange(5), torch.rand(5)), x)  # with itself, too


@pytest.mark.parametrize("own", [0.0, 0.3])
def test_statistics_are_mixed_and_content_is_not(own):
    x, order = features().double().float(), torch.tensor([1, 2, 3, 4, 0])
    got = mix_statistics(x, order, torch.full((5,), own), 1e-12)
    mean, deviation = x.mean(1), x.std(1, correction=0)
    torch.testing.assert_close(got.mean(1), own * mean + (1 - own) * mean[order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.std(1, correction=0), own * deviation + (1 - own) * deviation[order], atol=1e-4, rtol=1e-4)
    content = (x - mean[:, None]) / deviation[:, None]
    kept = (got - got.mean(1, keepdim=True)) / got.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(kept, content, atol=1e-4, rtol=1e-4)


def test_draws_follow_the_generator_and_p_is_the_share_that_is_mixed():
    x = features(400, 3, 2)
    torch.manual_seed(0)
    one = drawn_mix(x, MixStyleOptions(p=0.25, alpha=5.0))
    torch.manual_seed(0)
    assert torch.equal(drawn_mix(x, MixStyleOptions(p=0.25, alpha=5.0)), one)
    changed = (one != x).flatten(1).any(1).float().mean()
    assert 0.15 < changed < 0.35


def styled():
    options = encoder().options.model_dump()
    options["vision"]["mix_style"] = {"p": 1.0, "alpha": 1.0}
    torch.manual_seed(0)
    return DualEncoderOptions.model_validate(options).build(encoder().vocabulary)


def test_a_tower_mixes_in_training_alone():
    model, plain = styled(), encoder()
    plain.load_state_dict(model.state_dict())
    pixels = torch.randn(6, 3, 16, 16)
    assert torch.equal(model.eval().vision.embed(pixels), plain.eval().vision.embed(pixels))
    assert not torch.allclose(model.train().vision.embed(pixels), plain.vision.embed(pixels))
    assert model.vision.embed(pixels[:0]).shape == (0, 16)


def test_a_replayed_micro_batch_draws_what_its_first_pass_drew():
    model = styled().train()
    objective = ContrastiveOptions.model_validate({"name": "c", "kind": "contrastive"}).build(BuildContext(model))
    engine = Engine(model, [Weighted("c", objective, 1.0)], Companions([]), SingleProcess(), seed=0)
    found = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        loss = engine.update(pairs().split(3), Clock(0, 9)).loss
        found.append((loss, model.vision.patch.weight.grad.clone()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    # The gradient is that of the loss the draws gave: a small step along it lowers that loss.
    with torch.no_grad():
        model.vision.patch.weight -= 1e-2 * found[0][1] / found[0][1].norm()
    assert engine.update(pairs().split(3), Clock(0, 9)).loss < found[0][0]
