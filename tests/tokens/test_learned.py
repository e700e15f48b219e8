"""The learned choice of tokens: selector and merger of LaVIT, exact checks of core-select."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.model_makers import shaken
from tests.tokens.rows import COUNTS, batch, check_cached_decoding, reducing
from vlm.objectives import KeepRatioOptions
from vlm.objectives.base import BuildContext
from vlm.tokens.attention_merge import EPS, AttentionMerge, AttentionMergeOptions, policy_softmax
from vlm.tokens.learned import (
    BernoulliOptions,
    GumbelHardOptions,
    LearnedStep,
    Policy,
    at_least_one,
    bernoulli_hard,
    gumbel_hard,
    ratio_penalty,
)
from vlm.types import Views

WIDTH = 8
MERGE = AttentionMergeOptions(depth=2, heads=2)
STEP = {"score": {"kind": "learned-mlp"}, "select": {"kind": "gumbel-hard"}}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(select=None, merge=None, *, shake=0.3):
    torch.manual_seed(0)
    return shaken(LearnedStep(WIDTH, select or GumbelHardOptions(), merge), shake).double()


def merger(**changes):
    torch.manual_seed(0)
    return shaken(AttentionMerge(MERGE.model_copy(update=changes), WIDTH), 0.2).double()


@torch.no_grad()
def test_core_select_the_policy_reads_the_token_and_the_weighted_mean_of_its_picture():
    own = shaken(Policy(WIDTH), 0.3).double()
    x, weights = drawn(2, 5, WIDTH), torch.tensor([[1.0, 0, 1, 1, 0], [1, 1, 1, 1, 1]]).double()
    got = own(x, weights)
    norm, entry = own.entry[0], own.entry[1]
    for picture in range(2):
        h = F.gelu(entry(norm(x[picture])))
        mean = sum(w * row[4:] for w, row in zip(weights[picture], h)) / weights[picture].sum()
        for token in range(5):
            z = torch.cat([h[token, :4], mean])
            expected = F.log_softmax(own.head[4](F.gelu(own.head[2](F.gelu(own.head[0](z))))).float(), 0)
            assert torch.allclose(got[picture, token], expected, atol=1e-6)
    assert torch.allclose(own(x)[1], got[1])


def test_core_select_gumbel_is_hard_forward_and_soft_backward():
    logits = drawn(3, 6, 2).log_softmax(-1).requires_grad_()
    noise = -torch.empty(3, 6, 2, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(1)).log()
    keep = gumbel_hard(logits, noise, 0.7)
    assert torch.equal(keep.detach(), ((logits + noise)[..., 0] >= (logits + noise)[..., 1]).double())
    weights = drawn(3, 6, seed=2)
    (got,) = torch.autograd.grad((keep * weights).sum(), logits)
    (expected,) = torch.autograd.grad((((logits + noise) / 0.7).softmax(-1)[..., 0] * weights).sum(), logits)
    assert torch.allclose(got, expected, atol=1e-12)
    assert gumbel_hard(torch.zeros(1, 2), torch.zeros(1, 2), 1.0).tolist() == [1.0]  # a tie stays


@pytest.mark.parametrize("select", [GumbelHardOptions(temperature=0.5), BernoulliOptions()], ids=lambda s: s.kind)
def test_core_select_draws_follow_the_probability_and_repeat_with_the_seed(select):
    own = step(select).train()
    probability = torch.tensor([0.05, 0.5, 0.9])
    logits = torch.stack([probability, 1 - probability], -1).log().expand(20000, 3, 2)
    torch.manual_seed(5)
    keep = own.choose(logits)
    deviation = (probability * (1 - probability) / 20000).sqrt()
    assert ((keep.mean(0) - probability).abs() < 4.5 * deviation).all()
    torch.manual_seed(5)
    assert torch.equal(own.choose(logits), keep)
    assert own.eval().choose(logits[0]).tolist() == [0.0, 1.0, 1.0]


def test_core_select_bernoulli_gradient_is_that_of_the_probability():
    p = torch.tensor([0.2, 0.7], requires_grad=True)
    (bernoulli_hard(p, torch.tensor([0.5, 0.5])) * torch.tensor([3.0, 5.0])).sum().backward()
    assert p.grad.tolist() == [3.0, 5.0]


def test_core_select_the_ratio_penalty_is_0_where_the_mean_is_the_ratio():
    keep = torch.tensor([[1.0, 0, 0], [1, 1, 0]], requires_grad=True)
    got = ratio_penalty(keep, 1 / 3)
    assert torch.allclose(got, torch.tensor([0.0, 1 / 9]), atol=1e-7)
    got.sum().backward()
    assert torch.allclose(keep.grad, torch.tensor([[0.0] * 3, [2 / 9] * 3]), atol=1e-6)


@torch.no_grad()
def test_core_select_all_kept_is_the_identity_bit_for_bit():
    own = step()
    own.policy.head[4].bias.copy_(torch.tensor([50.0, -50.0]))
    x = drawn(3, 6, WIDTH)
    reduced = own(x)
    assert torch.equal(reduced.tokens, x)
    assert reduced.mask.all()
    assert torch.allclose(reduced.penalty, torch.full((3,), (2 / 3) ** 2))


@pytest.mark.parametrize("merge", [None, MERGE], ids=["gather", "merge"])
@torch.no_grad()
def test_core_select_learned_pictures_are_each_alone_in_order_and_never_empty(merge):
    own, x = step(merge=merge), drawn(9, 7, WIDTH)
    logits = own.policy(x)
    own.policy.head[4].bias[0] -= (logits[..., 0] - logits[..., 1]).median() + 1e-2
    together = own(x)
    counts = together.mask.sum(1)
    assert len(set(counts.tolist())) > 1
    logits = own.policy(x)
    for picture in range(9):
        alone = own(x[picture : picture + 1])
        assert torch.allclose(together.tokens[picture, : counts[picture]], alone.tokens[0], atol=1e-9)
        if merge is None:
            stays = (logits[picture, :, 0] >= logits[picture, :, 1]).nonzero()[:, 0]
            stays = stays if len(stays) else logits[picture, :, 0].argmax()[None]
            assert torch.equal(alone.tokens[0], x[picture, stays])
    none = at_least_one(torch.zeros(2, 3), torch.tensor([[[1.0, 5], [2, 5], [2, 5]], [[0, 5], [0, 5], [0, 5]]]))
    assert none.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_core_select_policy_softmax_by_loops():
    logits, policy = drawn(2, 4, 5) * 3, torch.tensor([[1.0, 0, 1, 1, 0]] * 4).double()
    allowed = torch.tensor([[True] * (i + 2) + [False] * (3 - i) for i in range(4)])
    got = policy_softmax(logits, policy, allowed)
    for b in range(2):
        for i in range(4):
            seen = [j for j in range(5) if allowed[i, j]]
            peak = max(float(logits[b, i, j]) for j in seen)
            e = [torch.exp(logits[b, i, j] - peak) * policy[i, j] for j in seen]
            expected = torch.zeros(5, dtype=torch.float64)
            for j, value in zip(seen, e):
                expected[j] = (value + EPS / len(seen)) / (sum(e) + EPS)
            assert torch.allclose(got[b, i], expected, atol=1e-12)
    assert torch.allclose(got.sum(-1), torch.ones(2, 4, dtype=torch.float64), atol=1e-12)


def test_core_select_with_nothing_dropped_the_cross_weights_are_uniform():
    assert torch.allclose(policy_softmax(drawn(2, 3, 6) * 9, torch.zeros(1, 6).double()), torch.full((2, 3, 6), 1 / 6).double(), atol=1e-12)


def test_core_select_policy_softmax_of_ones_is_the_softmax_and_passes_gradcheck():
    logits = drawn(3, 5)
    assert torch.allclose(policy_softmax(logits, torch.ones(1, 5).double()), logits.softmax(-1), atol=2e-6)
    policy = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.autograd.gradcheck(policy_softmax, (logits.requires_grad_(), policy))


@torch.no_grad()
def test_core_select_merging_reads_dropped_tokens_across_alone_and_nothing_after_a_token():
    x, keep = drawn(1, 6, WIDTH), torch.tensor([[1.0, 0, 1, 0, 1, 1]])
    changed = x.clone()
    changed[:, 3] = drawn(WIDTH, seed=8)
    stays = keep[0] > 0
    own = merger()
    before, after = own(x, keep)[0, stays], own(changed, keep)[0, stays]
    assert (before - after).abs().amax(-1).min() > 1e-3  # every kept token takes of what goes, before and after it
    for block in own.blocks:
        block.across.out.weight.zero_()
        block.across.out.bias.zero_()
    assert torch.allclose(own(x, keep)[0, stays], own(changed, keep)[0, stays], atol=2e-5)  # eps alone is left
    changed = x.clone()
    changed[:, 4:] = drawn(2, WIDTH, seed=9)  # later kept tokens
    assert torch.equal(own(x, keep)[0, :4], own(changed, keep)[0, :4])
    seeing = merger(causal=False)
    assert not torch.allclose(seeing(x, keep)[0, :4], seeing(changed, keep)[0, :4], atol=1e-3)


def test_core_select_gradients_reach_the_policy_through_kept_tokens_and_through_what_is_merged():
    for merge in (None, MERGE):
        own, x = step(merge=merge).train(), drawn(4, 6, WIDTH)
        torch.manual_seed(2)
        reduced = own(x)
        (torch.where(reduced.mask[..., None], reduced.tokens, 0.0) * drawn(*reduced.tokens.shape, seed=4)).sum().backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in own.policy.parameters())


@pytest.mark.parametrize("apply", [{"kind": "gather"}, {"kind": "attention-merge", "depth": 1, "heads": 2}], ids=lambda a: a["kind"])
def test_core_select_a_model_with_a_learned_choice_decodes_and_learns_its_share(apply):
    model = reducing({"pre": [STEP | {"apply": apply}]}, shake=0.4)
    with torch.no_grad():
        bias = model.reducers["0"].policy.head[4].bias
        tokens = reducing(None, shake=0.4).visual_tokens({"main": model.pixel_norms["main"](batch()["image"].values)})[0]
        logits = model.reducers["0"].policy(tokens)
        bias[0] -= (logits[..., 0] - logits[..., 1]).median() + 1e-3
        kept = model.visual_tokens({"main": model.pixel_norms["main"](batch()["image"].values)})[1].sum(1)
        assert 0 < kept.sum() < 16 * sum(COUNTS)
        check_cached_decoding(model, steps=2)
    objective = KeepRatioOptions().build(BuildContext(model))
    model.train()
    torch.manual_seed(0)
    output = model.encode(batch(), {"text": frozenset({"statistics"})})["text"]
    terms = objective(Views({"model/text": output}), None)
    assert terms.values.shape == (4,)
    assert terms.values[1] == 0  # a row without a picture
    assert float(objective.count(batch())) == 4
    terms.total().backward()
    assert bool(bias.grad.abs().sum() > 0)


def test_core_select_learned_parts_that_do_not_fit_are_refused():
    for wrong, said in (
        ([{"score": {"kind": "norm"}, "select": {"kind": "gumbel-hard"}}], "goes with select"),
        ([{"score": {"kind": "learned-mlp"}, "select": {"kind": "top-k", "ratio": 0.5}}], "goes with select"),
        ([{"score": {"kind": "norm"}, "select": {"kind": "top-k", "ratio": 0.5}, "apply": {"kind": "attention-merge"}}], "needs score"),
    ):
        with pytest.raises(ValueError, match=said):
            reducing({"pre": wrong})
    with pytest.raises(ValueError, match="learned in training"):
        reducing({"pre": [STEP], "when": "inference"})
    with pytest.raises(ValueError, match="heads"):
        reducing({"pre": [STEP | {"apply": {"kind": "attention-merge", "heads": 3}}]})
    with pytest.raises(ValueError, match="no learned choice"):
        KeepRatioOptions().build(BuildContext(reducing(None)))
    assert "another number" in reducing({"pre": [STEP]}).options.tokens.unexportable
