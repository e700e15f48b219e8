"""The grouping objective: the exact checks of dreamlip, and its independence of how the update is cut."""

from __future__ import annotations

import math
import threading

import pytest
import torch
import torch.nn.functional as F

from tests.training.test_engine import Threads
from vlm.models import DualEncoderOptions
from vlm.objectives import BuildContext, ContrastiveOptions, GroupingOptions
from vlm.objectives.grouping import group, patch_weights
from vlm.training.companions import Companions
from vlm.training.engine import Clock, Engine, Weighted
from vlm.types import Batch, Context, Outputs, Pictures, SingleProcess, TokenIds, Views, VocabularyLayout

VOCABULARY = VocabularyLayout.of_text(50, {"bos": 1, "eos": 3, "pad": 0})
ENCODER = {
    "embed_dim": 16,
    "vision": {"width": 24, "depth": 1, "heads": 2, "image_size": 16, "patch_size": 4},
    "text": {"width": 24, "depth": 1, "heads": 2, "length": 9},
}
CLOCK = Clock(0, 10)
COUNTS = [3, 1, 2, 4, 0, 3, 2]
"""Sentences of each sample; one has none."""


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encoder(seed=0):
    torch.manual_seed(seed)
    return DualEncoderOptions.model_validate(ENCODER).build(VOCABULARY).double()


def captioned(counts=COUNTS, seed=0):
    """Pictures with so many sentences each, in sample order."""
    generator = torch.Generator().manual_seed(seed)
    n, rows = len(counts), sum(counts)
    ids = torch.randint(4, 50, (rows, 9), generator=generator)
    mask = torch.ones(rows, 9, dtype=torch.bool)
    for row in range(rows):
        stop = 2 + row % 7
        ids[row, stop], ids[row, stop + 1 :], mask[row, stop + 1 :] = 3, 0, False
    index = torch.arange(n)
    slot = torch.tensor([k for count in counts for k in range(count)])
    streams = {
        "image": Pictures(torch.rand(n, 3, 16, 16, generator=generator), torch.ones(n, dtype=torch.bool), index),
        "text": TokenIds(ids, mask, index.repeat_interleave(torch.tensor(counts)), slot),
    }
    return Batch(streams, [f"k{i}" for i in range(n)], index, index * 0)


def built(model, **options):
    return GroupingOptions.model_validate(options).build(BuildContext(model))


def engine_of(communicator=None, objectives=None):
    model = encoder()
    objectives = objectives or [ContrastiveOptions(name="multi-positive", targets="slots"), GroupingOptions()]
    entries = [Weighted(o.name, o.build(BuildContext(model)).double(), o.weight) for o in objectives]
    return Engine(model, entries, Companions(), communicator or SingleProcess(), seed=0)


def gradients(engine):
    named = {**dict(engine.model.named_parameters()), **dict(engine.objectives[-1].objective.named_parameters())}
    return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


def views_of(tokens, text, index, token_mask=None, mask=None, rows_mask=None):
    """tokens [B, P, E] of samples 0..B-1, text [n, E] of the samples `index`."""
    b = len(tokens)
    token_mask = torch.ones(tokens.shape[:2], dtype=torch.bool) if token_mask is None else token_mask
    live = torch.ones(b, dtype=torch.bool) if rows_mask is None else rows_mask
    said = torch.ones(len(text), dtype=torch.bool) if mask is None else mask
    return Views({
        "model/image": Outputs(torch.arange(b), live, tokens=tokens, token_mask=token_mask, log_scale=torch.tensor(2.0)),
        "model/text": Outputs(torch.as_tensor(index), said, embedding=text, log_scale=torch.tensor(2.0)),
    })


def run(objective, views):
    """(what is gathered, its terms)"""
    context = Context(Batch({}, [], torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)), SingleProcess())
    prepared = objective.prepare(views, context)
    return prepared, objective(prepared, context)


def spelt_out(tokens, text, index, scale, norm="minmax", delta=0.0):
    """The loss of the entry, sentence by sentence, in float64."""
    v, t = F.normalize(tokens.double(), dim=-1), F.normalize(text.double(), dim=-1)
    groups = []
    for sentence, sample in zip(t, index):
        a = v[sample] @ sentence
        w = a.softmax(0) if norm == "softmax" else (a - a.min()) / (a.max() - a.min())
        w = torch.where(w < (delta if delta >= 0 else 1 / len(a)), 0, w)
        groups.append(F.normalize((w / w.sum()) @ v[sample], dim=0))
    logits = scale * torch.stack(groups) @ t.T
    target = torch.arange(len(t))
    both = [F.cross_entropy(x, target, reduction="none") for x in (logits, logits.T)]
    return 0.5 * (both[0] + both[1])


@pytest.mark.parametrize(("norm", "delta"), [("minmax", 0.0), ("minmax", 0.3), ("minmax", -1.0), ("softmax", 0.0), ("softmax", -1.0)])
def test_dreamlip_grouping_equals_the_formula(norm, delta):
    tokens, index = random(4, 7, 5), [0, 0, 0, 1, 3, 3]
    text = random(6, 5, seed=1)
    objective = built(encoder(), norm=norm, delta=delta, temperature=0.2)
    _, terms = run(objective, views_of(tokens, text, index))
    assert terms.sample_index.tolist() == index
    torch.testing.assert_close(terms.values.double(), spelt_out(tokens, text, index, 5.0, norm, delta), rtol=1e-5, atol=1e-5)


def test_dreamlip_softmax_of_one_patch_is_infonce_of_sentence_and_patch():
    tokens, text = random(5, 1, 6), random(5, 6, seed=1)
    objective = built(encoder(), norm="softmax", temperature=0.1)
    _, terms = run(objective, views_of(tokens, text, range(5)))
    logits = 10 * F.normalize(tokens[:, 0], dim=1) @ F.normalize(text, dim=1).T
    target = torch.arange(5)
    expected = 0.5 * (F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none"))
    torch.testing.assert_close(terms.values.double(), expected, rtol=1e-5, atol=1e-5)


def test_dreamlip_the_weakest_patch_has_weight_0_and_weights_sum_to_1():
    similarity = random(3, 4, 9)
    weights = patch_weights(similarity, torch.ones(3, 4, 9, dtype=torch.bool))
    weakest = similarity.argmin(-1, keepdim=True)
    assert (weights.gather(-1, weakest) == 0).all()
    assert ((weights > 0).sum(-1) == 8).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, dtype=torch.float64))


def test_dreamlip_weights_below_delta_are_0_and_a_negative_delta_is_1_over_patches():
    similarity = torch.tensor([[0.0, 0.1, 0.2, 0.5, 1.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    cut = patch_weights(similarity, mask, delta=0.2)
    assert cut.tolist()[0] == pytest.approx([0, 0, 0.2 / 1.7, 0.5 / 1.7, 1 / 1.7])
    assert torch.equal(patch_weights(similarity, mask, delta=-1.0), cut)  # 1/5
    fewer = torch.tensor([[True, True, True, False, True]])
    assert patch_weights(similarity, fewer, delta=-1.0).tolist() == [[0, 0, 0, 0, 1]]  # 1/4: only those kept are counted


@pytest.mark.parametrize("norm", ["minmax", "softmax"])
@pytest.mark.parametrize("patches", [1, 4])
def test_dreamlip_equal_similarities_give_uniform_weights_and_no_nan(norm, patches):
    tokens = random(2, 1, 6).expand(2, patches, 6).clone().requires_grad_()
    text = random(2, 3, 6, seed=1).requires_grad_()
    similarity = F.normalize(text, dim=-1) @ F.normalize(tokens, dim=-1).transpose(1, 2)
    weights = patch_weights(similarity, torch.ones(2, 3, patches, dtype=torch.bool), norm=norm)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / patches), rtol=1e-6, atol=0)
    u = group(tokens, torch.ones(2, patches, dtype=torch.bool), text, norm=norm)
    torch.testing.assert_close(u, F.normalize(tokens[:, :1], dim=-1).expand(2, 3, 6))
    (u * random(2, 3, 6, seed=2)).sum().backward()
    assert torch.isfinite(tokens.grad).all()
    assert torch.isfinite(text.grad).all()


@pytest.mark.parametrize("norm", ["minmax", "softmax"])
def test_dreamlip_a_threshold_above_every_weight_leaves_them_uniform(norm):
    similarity, mask = torch.tensor([[0.1, 0.2, 0.3, 9.0]]), torch.tensor([[True, True, True, False]])
    weights = patch_weights(similarity, mask, norm=norm, delta=0.99)
    wanted = [[0.0, 0.0, 1.0, 0.0]] if norm == "minmax" else [[1 / 3, 1 / 3, 1 / 3, 0.0]]  # no softmax weight of three reaches 0.99
    torch.testing.assert_close(weights, torch.tensor(wanted))


@pytest.mark.parametrize("norm", ["minmax", "softmax"])
def test_dreamlip_masked_patches_are_never_read(norm):
    tokens, mask = random(3, 6, 5), torch.ones(3, 6, dtype=torch.bool)
    text = random(3, 2, 5, seed=1)
    mask[0, 4:], mask[2] = False, False
    dirty = torch.where(mask[..., None], tokens, float("nan")).requires_grad_()
    u = group(dirty, mask, text, norm=norm)
    torch.testing.assert_close(u[:1], group(tokens[:1, :4], mask[:1, :4], text[:1], norm=norm))
    assert (u[2] == 0).all()  # nothing to group
    u.sum().backward()
    assert torch.isfinite(dirty.grad).all()
    assert (dirty.grad[~mask] == 0).all()


@pytest.mark.parametrize(("norm", "delta"), [("minmax", 0.0), ("minmax", 0.3), ("softmax", 0.0)])
def test_dreamlip_the_gradient_reaches_patches_through_weights_and_sum(norm, delta):
    tokens, text, mask = random(2, 5, 4).requires_grad_(), random(2, 3, 4, seed=1).requires_grad_(), torch.ones(2, 5, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda v, t: group(v, mask, t, norm=norm, delta=delta), (tokens, text), atol=1e-6)
    along = random(2, 3, 4, seed=2)

    def gradient(weights_of):
        v = F.normalize(tokens, dim=-1)
        similarity = F.normalize(text, dim=-1) @ v.transpose(1, 2)
        w = weights_of(patch_weights(similarity, mask[:, None].expand(2, 3, 5), norm=norm, delta=delta))
        return torch.autograd.grad((F.normalize(w[0] @ w[1](v), dim=-1) * along).sum(), tokens, allow_unused=True)[0]

    whole = gradient(lambda w: (w, lambda v: v))
    through_sum, through_weights = gradient(lambda w: (w.detach(), lambda v: v)), gradient(lambda w: (w, lambda v: v.detach()))
    assert through_sum.abs().max() > 1e-3
    assert through_weights.abs().max() > 1e-3
    torch.testing.assert_close(whole, through_sum + through_weights)


def test_dreamlip_permuting_sentences_of_a_picture_changes_nothing():
    tokens, text, index = random(3, 6, 5), random(7, 5, seed=1), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    objective = built(encoder(), temperature="own")
    order = torch.tensor([2, 0, 1, 4, 3, 6, 5])
    first, second = run(objective, views_of(tokens, text, index))[1], run(objective, views_of(tokens, text[order], index[order]))[1]
    torch.testing.assert_close(second.values, first.values[order])
    # and samples that stand in another order meet their own pictures still: nothing is paired by place
    moved = torch.tensor([6, 3, 0, 5, 1, 4, 2])
    third = run(objective, views_of(tokens, text[moved], index[moved]))[1]
    torch.testing.assert_close(third.values, first.values[moved])


def test_dreamlip_slots_of_one_caption_are_infonce():
    batch = captioned([1] * 6)
    assert (batch["text"].slot == 0).all()
    one, many = (engine_of(objectives=[ContrastiveOptions(targets=targets)]) for targets in ("diagonal", "slots"))
    assert one.update([batch], CLOCK).loss == pytest.approx(many.update([batch], CLOCK).loss, abs=1e-7)
    for name, grad in gradients(one).items():
        torch.testing.assert_close(gradients(many)[name], grad)


def test_dreamlip_slots_are_the_mean_of_one_infonce_a_slot():
    batch, count = captioned([3] * 5), 3
    slots = engine_of(objectives=[ContrastiveOptions(targets="slots")]).update([batch], CLOCK).loss
    singles = []
    for k in range(count):
        text = batch["text"].rows(batch["text"].slot == k)
        part = Batch({"image": batch["image"], "text": text}, batch.keys, batch.draws, batch.epoch)
        singles.append(engine_of(objectives=[ContrastiveOptions()]).update([part], CLOCK).loss)
    assert slots == pytest.approx(sum(singles) / count, abs=1e-6)


def test_dreamlip_slots_do_not_depend_on_the_order_of_sub_captions():
    batch = captioned([3] * 5)
    order = torch.tensor([[3 * i, 3 * i + 2, 3 * i + 1] for i in range(5)]).flatten()  # slots 1 and 2 change places everywhere
    text = batch["text"].rows(order)
    text = TokenIds(text.values, text.mask, text.sample_index, batch["text"].slot)
    other = Batch({"image": batch["image"], "text": text}, batch.keys, batch.draws, batch.epoch)
    first, second = engine_of().update([batch], CLOCK), engine_of().update([other], CLOCK)
    assert first.losses == pytest.approx(second.losses, abs=1e-6)


def test_dreamlip_leaves_are_one_vector_a_sentence():
    engine, batch = engine_of(), captioned()
    views = engine._views(batch, CLOCK, 0)
    assert views["model/image"].tokens.shape == (7, 16, 16)
    gathered = {o.name: o.objective.prepare(views, engine._context(batch, CLOCK)) for o in engine.objectives}
    grouped = gathered["grouping"]["model/image"]
    assert grouped.embedding.shape == (sum(COUNTS), 16)
    assert torch.equal(grouped.sample_index, batch["text"].sample_index)
    for views in gathered.values():  # the pooled objective does not carry the patches either
        assert all(outputs.tokens is None and outputs.token_mask is None for outputs in views.values())


@pytest.mark.parametrize("parts", [2, 4])
def test_dreamlip_gradient_caching_equals_the_whole_batch(parts):
    batch = captioned()
    whole, cut = engine_of(), engine_of()
    first, second = whole.update([batch], CLOCK), cut.update(batch.split(parts), CLOCK)
    assert first.losses == pytest.approx(second.losses, abs=1e-7)
    assert "log_scale" in gradients(whole)
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(gradients(cut)[name], grad, rtol=1e-4, atol=1e-6)


def test_dreamlip_ranks_with_uneven_sentences_equal_one_process():
    batch = captioned()
    alone = engine_of()
    expected = alone.update([batch], CLOCK)
    group_of, results = Threads(2), [None, None]
    engines = [engine_of(group_of.member(rank)) for rank in range(2)]
    bounds = [0, 3, 7]  # 6 and 9 sentences

    def work(rank):
        results[rank] = engines[rank].update(batch.samples(bounds[rank], bounds[rank + 1]).split(1 + rank), CLOCK)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rank in range(2):
        assert results[rank].losses == pytest.approx(expected.losses, abs=1e-7)
        for name, grad in gradients(alone).items():
            torch.testing.assert_close(gradients(engines[rank])[name], grad, rtol=1e-4, atol=1e-6)


def test_sentences_without_a_picture_have_no_term_and_no_gradient():
    tokens, text = random(3, 4, 5).requires_grad_(), random(5, 5, seed=1)
    rows_mask, mask = torch.tensor([True, False, True]), torch.tensor([True, True, True, False, True])
    dirty = text.clone()
    dirty[3] = float("nan")
    dirty.requires_grad_()
    _, terms = run(built(encoder()), views_of(tokens, dirty, [0, 1, 2, 2, 0], mask=mask, rows_mask=rows_mask))
    assert terms.sample_index.tolist() == [0, 2, 0]
    terms.values.sum().backward()
    assert torch.isfinite(tokens.grad).all()
    assert (tokens.grad[1] == 0).all()
    assert (dirty.grad[[1, 3]] == 0).all()


def test_nothing_to_group_is_an_empty_loss():
    _, terms = run(built(encoder()), views_of(random(2, 3, 5), random(0, 5), torch.zeros(0, dtype=torch.int64)))
    assert len(terms.values) == 0


def test_the_own_scale_stays_within_1_and_100():
    objective = built(encoder())
    views = views_of(random(2, 3, 5), random(2, 5, seed=1), [0, 1])
    for value, wanted in ((-3.0, 1.0), (9.0, 100.0), (math.log(20.0), 20.0)):
        with torch.no_grad():
            objective.log_scale.fill_(value)
        assert float(run(objective, views)[1].scalars["scale"]) == pytest.approx(wanted, rel=1e-5)
    assert float(run(built(encoder(), temperature="model"), views)[1].scalars["scale"]) == pytest.approx(math.exp(2.0))
    with pytest.raises(ValueError, match="above 0"):
        built(encoder(), temperature=0.0)


def test_pictures_of_several_rows_are_refused():
    views = views_of(random(2, 3, 5), random(2, 5, seed=1), [0, 1])
    twice = Outputs(torch.tensor([0, 0]), torch.ones(2, dtype=torch.bool), tokens=random(2, 3, 5), token_mask=torch.ones(2, 3, dtype=torch.bool))
    views["model/image"] = twice
    with pytest.raises(ValueError, match="one row a sample"):
        run(built(encoder()), views)
