"""Targets of the contrastive objective against the dense matrix of targets, and over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.objectives.test_contrastive import encoder, engine_for, gradients, pairs
from tests.ops.test_contrastive_ring import Threads
from vlm import ops
from vlm.layers import normalise
from vlm.objectives import BuildContext, ContrastiveOptions
from vlm.training.engine import Clock
from vlm.types import Batch, Context, Labels, Outputs, SingleProcess, Views

SCALE, BIAS = torch.tensor(1.5, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)


def setting(n, owner=None, width=6, **numbers):
    """(views of the model and a teacher, context): n rows and as many columns, or those of `owner`."""
    generator = torch.Generator().manual_seed(4)
    everyone, owner = torch.arange(n), torch.arange(n) if owner is None else torch.tensor(owner)
    views = Views()
    for who, size in (("model", width), ("teacher", 4)):
        for name, index in (("image", everyone), ("text", owner)):
            x = torch.randn(len(index), size, dtype=torch.float64, generator=generator)
            live = torch.ones(len(index), dtype=torch.bool)
            views[f"{who}/{name}"] = Outputs(index, live, x.requires_grad_(who == "model"), log_scale=SCALE, bias=BIAS)
    streams = {}
    for name, values in numbers.items():
        values = torch.tensor(values)
        streams[name] = Labels(values, torch.ones(len(values), dtype=torch.bool), everyone if len(values) == n else owner)
    return views, Context(Batch(streams, [f"k{i}" for i in range(n)], everyone, everyone * 0), SingleProcess())


def with_tokens(views):
    """One token a row, the embedding."""
    one = {key: torch.ones(len(view.mask), 1, dtype=torch.bool) for key, view in views.items()}
    return Views({key: replace(view, tokens=view.embedding[:, None], token_mask=one[key]) for key, view in views.items()})


def terms_of(views, context, **options):
    return ContrastiveOptions.model_validate(options).build(BuildContext(encoder()))(views, context)


def cosines(views, who="model"):
    return normalise(views[f"{who}/image"].embedding) @ normalise(views[f"{who}/text"].embedding).T


def same(views, values, expected):
    """Values and the gradients of both embeddings."""
    values, expected = values.double(), expected.double()
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    leaves = [views["model/image"].embedding, views["model/text"].embedding]
    weights = torch.arange(1.0, len(expected) + 1, dtype=torch.float64)
    found, wanted = (torch.autograd.grad((weights * v).sum(), leaves, retain_graph=True) for v in (values, expected))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def softmax_by_hand(z, rows, columns):
    """Half the cross-entropies of rows against `rows` and of columns against `columns`, both [R, C]."""
    by_row = -(rows * z.log_softmax(1)).sum(1)
    by_column = -(columns * z.log_softmax(0)).sum(0)
    return by_row, by_column


NOISE = [0.0, 1.0, 0.5, 0.2, 0.9]


def test_core_infonce_smoothing_of_each_sample_is_the_dense_target():
    views, context = setting(5, noise=NOISE)
    eps = 0.4 * torch.tensor(NOISE, dtype=torch.float64)
    eye = torch.eye(5, dtype=torch.float64)
    rows, columns = (eye * (1 - e) + e / 5 for e in (eps[:, None], eps[None, :]))
    by_row, by_column = softmax_by_hand(SCALE.exp() * cosines(views), rows, columns)
    same(views, terms_of(views, context, smoothing=0.4, smooth_by="noise").values, 0.5 * (by_row + by_column))


def test_core_siglip_smoothing_of_each_sample_softens_its_own_label_alone():
    views, context = setting(5, noise=NOISE)
    z = SCALE.exp() * cosines(views) + BIAS
    label = torch.diag(1 - 0.4 * torch.tensor(NOISE, dtype=torch.float64))
    terms = label * F.softplus(-z) + (1 - label) * F.softplus(z)
    same(views, terms_of(views, context, form="sigmoid", smoothing=0.4, smooth_by="noise").values, 0.5 * (terms.sum(0) + terms.sum(1)))


def test_core_siglip_half_a_label_has_no_gradient_where_the_logit_is_0():
    views, context = setting(1, noise=[1.0])
    x, y = (normalise(views[f"model/{s}"].embedding.detach()) for s in ("image", "text"))
    bias = -SCALE.exp() * (x * y).sum()
    views = Views({k: Outputs(v.sample_index, v.mask, v.embedding, log_scale=SCALE, bias=bias) for k, v in views.items()})
    terms = terms_of(views, context, form="sigmoid", smoothing=0.5, smooth_by="noise")
    (gradient,) = torch.autograd.grad(terms.values.sum(), views["model/image"].embedding)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
@pytest.mark.parametrize("similarity", ["global", "late-max"])
def test_core_siglip_no_noise_is_the_plain_loss(form, similarity):
    views, context = setting(5, noise=[0.0] * 5)
    views = with_tokens(views)
    plain = terms_of(views, context, form=form, similarity=similarity).values
    same(views, terms_of(views, context, form=form, similarity=similarity, smoothing=0.5, smooth_by="noise").values, plain)


def test_core_filip_smoothing_of_each_sample_on_matrices():
    """One token a sample: late interaction is the cosine."""
    views, context = setting(5, noise=NOISE)
    views = with_tokens(views)
    for form in ("softmax", "sigmoid"):
        options = {"form": form, "smoothing": 0.4, "smooth_by": "noise"}
        pooled = terms_of(views, context, **options).values
        same(views, terms_of(views, context, similarity="late-max", **options).values, pooled)


OWNER = [2, 0, 1, 0, 2, 2]
SHARE = [0.5, 0.2, 0.7, 0.6, 0.0, 0.3]


def test_core_infonce_listed_columns_have_their_shares():
    views, context = setting(3, OWNER, share=SHARE)
    owner, share = torch.tensor(OWNER), torch.tensor(SHARE, dtype=torch.float64)
    own = (torch.arange(3)[:, None] == owner).double()
    rows = own * share / (own * share).sum(1, keepdim=True)
    by_row, by_column = softmax_by_hand(SCALE.exp() * cosines(views), rows, own)
    expected = 0.5 * (by_row + (rows * by_column).sum(1))
    same(views, terms_of(views, context, targets="listed", shares="share").values, expected)
    # Equal shares are `multi`.
    views, context = setting(3, OWNER, share=[0.4] * 6)
    same(views, terms_of(views, context, targets="listed", shares="share").values, terms_of(views, context, targets="multi").values)


def test_core_siglip_listed_shares_are_labels():
    views, context = setting(3, OWNER, share=SHARE)
    z = SCALE.exp() * cosines(views) + BIAS
    own = (torch.arange(3)[:, None] == torch.tensor(OWNER)).double()
    share = torch.tensor(SHARE, dtype=torch.float64)
    parts = own * share / (own * share).sum(1, keepdim=True)
    for taught in ({}, {"teacher": "teacher", "teacher_share": 0.25}):
        label = own * share
        if taught:
            label = 0.75 * label + 0.25 * torch.sigmoid(SCALE.exp() * cosines(views, "teacher") + BIAS).detach()
        terms = label * F.softplus(-z) + (1 - label) * F.softplus(z)
        expected = 0.5 * (terms.sum(1) + (parts * terms.sum(0)).sum(1))
        got = terms_of(views, context, form="sigmoid", targets="listed", shares="share", **taught)
        same(views, got.values, expected)


def test_a_sample_without_a_share_has_the_value_0():
    views, context = setting(3, OWNER, share=[0.5, 0.0, 0.7, 0.0, 0.1, 0.3])
    terms = terms_of(views, context, targets="listed", shares="share")
    assert terms.values[0] == 0
    assert (terms.values[1:] > 0).all()


@pytest.mark.parametrize(("shares", "form", "message"), [
    ([0.5] * 3, "softmax", "one number a column"), ([-0.5, *SHARE[1:]], "softmax", "must not be negative"), ([1.5, *SHARE[1:]], "sigmoid", "at most 1"),
])
def test_shares_that_do_not_fit_are_named(shares, form, message):
    views, context = setting(3, OWNER, share=shares)
    with pytest.raises(ValueError, match=message):
        terms_of(views, context, targets="listed", shares="share", form=form)


def test_noise_outside_of_0_to_1_is_named():
    views, context = setting(2, noise=[0.2, 1.2])
    with pytest.raises(ValueError, match=r"expected numbers in 0\.\.1"):
        terms_of(views, context, smoothing=0.3, smooth_by="noise")


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("top", [1, 3, 9])
def test_core_infonce_a_teachers_likeliest_pairs(top, share):
    views, context = setting(6)
    u = 3.0 * cosines(views, "teacher").detach()

    def target(u):
        kept = torch.full_like(u, -torch.inf).scatter(1, u.topk(min(top, 6), 1).indices, 0.0)
        return (1 - share) * torch.eye(6, dtype=u.dtype) + share * (u + kept).softmax(1)

    rows, columns = target(u), target(u.T).T
    by_row, by_column = softmax_by_hand(SCALE.exp() * cosines(views), rows, columns)
    options = {"teacher": "teacher", "teacher_share": share, "teacher_scale": 3.0}
    got = terms_of(views, context, teacher_top=top, **options).values
    same(views, got, 0.5 * (by_row + by_column))
    if top >= 6:
        same(views, got, terms_of(views, context, **options).values)


def test_core_siglip_a_teachers_likeliest_pairs():
    views, context = setting(6)
    u = 3.0 * cosines(views, "teacher").detach() + BIAS
    z = SCALE.exp() * cosines(views) + BIAS
    likely = torch.zeros_like(u).scatter(1, u.topk(2, 1).indices, 1.0)
    label = 0.6 * (0.9 * torch.eye(6) + 0.1 * (1 - torch.eye(6))) + 0.4 * likely * u.sigmoid()
    terms = label * F.softplus(-z) + (1 - label) * F.softplus(z)
    options = {"teacher": "teacher", "teacher_share": 0.4, "teacher_scale": 3.0, "teacher_top": 2, "smoothing": 0.1}
    same(views, terms_of(views, context, form="sigmoid", **options).values, 0.5 * (terms.sum(0) + terms.sum(1)))


def test_likeliest_does_not_depend_on_the_chunk():
    x, y = torch.randn(13, 5), torch.randn(7, 5)
    index, _ = ops.likeliest(x, y, 3)
    assert torch.equal(index, (x @ y.T).topk(3, 1).indices)
    assert torch.equal(ops.likeliest(x, y, 3, chunk=8)[0], index)
    assert ops.likeliest(x, y, 99)[0].shape == (13, 7)
    assert ops.likeliest(x[:0], y, 2)[0].shape == (0, 2)
    assert ops.likeliest(x, y[:0], 2)[0].shape == (13, 0)
    assert not ops.likeliest(x.requires_grad_(), y, 3)[1].requires_grad


SPLIT = [
    {"smoothing": 0.3, "smooth_by": "noise"},
    {"smoothing": 0.3, "smooth_by": "noise", "form": "sigmoid"},
    {"smoothing": 0.3, "smooth_by": "noise", "similarity": "late-max"},
    {"targets": "listed", "shares": "share", "weights": "trust"},
    {"targets": "listed", "shares": "share", "form": "sigmoid"},
    {"teacher": "teacher", "teacher_share": 0.5, "teacher_top": 3},
    {"teacher": "teacher", "teacher_share": 0.5, "teacher_top": 3, "form": "sigmoid"},
]


@pytest.mark.parametrize("options", SPLIT, ids=str)
def test_micro_batches_do_not_matter(options):
    form = options.get("form", "softmax")
    batch = pairs(8, captions=2 if "shares" in options else 1)
    found = []
    for parts in ([batch], [batch.samples(0, 3), batch.samples(3, 8)]):
        companion = encoder(form, seed=1) if "teacher" in options else None
        engine = engine_for(encoder(form), companion=companion, **options)
        found.append((engine.update(parts, Clock(0, 9)).loss, gradients(engine)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for a, b in zip(found[1][1], found[0][1]):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6)


def test_core_infonce_a_ring_smooths_each_sample_as_the_gathered_update_does():
    whole, options = pairs(9), {"smoothing": 0.3, "smooth_by": "noise"}
    alone = engine_for(encoder(), **options)
    expected = alone.update([whole], Clock(0, 9)).loss

    def work(communicator):
        part = whole.samples((0, 4)[communicator.rank], (4, 9)[communicator.rank])
        engine = engine_for(models[communicator.rank], communicator, gather="ring", **options)
        return engine.update([part], Clock(0, 9)).loss, gradients(engine)

    models = [encoder() for _ in range(2)]
    for loss, got in Threads(2).run(work):
        assert loss == pytest.approx(expected, rel=1e-5)
        for a, b in zip(got, gradients(alone)):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6)
