"""The contrastive objective: every option learns, and options say what they mean."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from tests.ops.test_contrastive_ring import Threads
from vlm import ops
from vlm.layers import normalise
from vlm.models import DualEncoderOptions
from vlm.objectives import BuildContext, ContrastiveOptions
from vlm.training.companions import Companion, Companions
from vlm.training.engine import Clock, Engine, Weighted
from vlm.types import (
    Batch,
    Context,
    Labels,
    Outputs,
    Pictures,
    SingleProcess,
    TokenIds,
    Views,
    VocabularyLayout,
)

VOCABULARY = VocabularyLayout.of_text(50, {"bos": 1, "eos": 3, "pad": 0})
ENCODER = {
    "embed_dim": 16,
    "vision": {"width": 24, "depth": 1, "heads": 2, "image_size": 16, "patch_size": 8},
    "text": {"width": 24, "depth": 1, "heads": 2, "length": 9},
}


def encoder(form="softmax", seed=0):
    torch.manual_seed(seed)
    changes = {"log_scale": 2.3, "bias": -3.0} if form == "sigmoid" else {}
    return DualEncoderOptions.model_validate(ENCODER | changes).build(VOCABULARY)


def pairs(n=12, captions=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = n * captions
    ids = torch.randint(4, 50, (rows, 9), generator=generator)
    mask = torch.ones(rows, 9, dtype=torch.bool)
    for row in range(rows):
        stop = 2 + row % 7
        ids[row, stop], ids[row, stop + 1 :], mask[row, stop + 1 :] = 3, 0, False
    index, owner = torch.arange(n), torch.arange(n).repeat_interleave(captions)
    ones = torch.ones(n, dtype=torch.bool)
    streams = {
        "image": Pictures(torch.rand(n, 3, 16, 16, generator=generator), ones, index),
        "text": TokenIds(ids, mask, owner, torch.arange(captions).repeat(n) if captions > 1 else None),
        "group": Labels(torch.arange(n) // 2, ones, index),
        "trust": Labels(torch.linspace(0.2, 1.0, n), ones, index),
        "noise": Labels(torch.linspace(0.0, 1.0, n), ones, index),
        "share": Labels(torch.linspace(1.0, 0.1, rows), torch.ones(rows, dtype=torch.bool), owner),
    }
    return Batch(streams, [f"k{i}" for i in range(n)], index, index * 0)


def engine_for(model, communicator=None, companion=None, **options):
    chosen = ContrastiveOptions.model_validate(options)
    companions = [] if companion is None else [Companion("teacher", companion, None)]
    built = chosen.build(BuildContext(model))
    return Engine(model, [Weighted("contrastive", built, 1.0)], Companions(companions), communicator or SingleProcess(), seed=0)


OPTIONS = [
    {"smoothing": 0.1},
    {"smoothing": 0.05, "form": "sigmoid"},
    {"targets": "groups"},
    {"exclude": "group", "decoupled": True},
    {"exclude": "group", "form": "sigmoid", "negative_weight": 0.5},
    {"exclude_similar": 0.9},
    {"teacher": "teacher", "teacher_share": 0.5},
    {"teacher": "teacher", "teacher_share": 0.5, "teacher_scale": 10.0, "form": "sigmoid"},
    {"queue": 20},
    {"queue": 20, "keys": "teacher"},
    {"gradient": "rows"},
    {"gradient": "columns", "direction": "columns"},
    {"weights": "trust"},
    {"similarity": "token-mean"},
    {"similarity": "late-max"},
    {"similarity": "late-max", "keep_ratio": 0.5, "aggregate": "sum", "temperature": 1.0},
    {"similarity": "late-max", "form": "sigmoid", "direction": "rows"},
    {"similarity": "late-max", "targets": "groups", "gather": "none"},
    {"similarity": "mutual-guided", "sharpness": 10.0},
    {"gather": "ring"},
    {"gather": "ring", "form": "sigmoid", "targets": "groups"},
    {"gather": "none", "temperature": "own"},
    {"targets": "multi"},
    {"targets": "slots"},
    {"targets": "slots", "similarity": "late-max"},
    {"targets": "multi", "form": "sigmoid"},
    {"targets": "listed", "shares": "share"},
    {"targets": "listed", "shares": "share", "form": "sigmoid"},
    {"targets": "listed", "shares": "share", "teacher": "teacher", "teacher_share": 0.3, "smoothing": 0.1},
    {"smoothing": 0.3, "smooth_by": "noise"},
    {"smoothing": 0.3, "smooth_by": "noise", "form": "sigmoid"},
    {"smoothing": 0.3, "smooth_by": "noise", "similarity": "late-max"},
    {"smoothing": 0.3, "smooth_by": "noise", "similarity": "late-max", "form": "sigmoid"},
    {"smoothing": 0.3, "smooth_by": "noise", "targets": "multi"},
    {"smoothing": 0.3, "smooth_by": "noise", "gather": "ring"},
    {"teacher": "teacher", "teacher_share": 0.5, "teacher_top": 3},
    {"teacher": "teacher", "teacher_share": 0.5, "teacher_top": 3, "form": "sigmoid"},
    {"teacher": "teacher", "teacher_share": 0.5, "teacher_top": 3, "targets": "slots", "smoothing": 0.2, "smooth_by": "noise"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))
def test_every_option_learns(options):
    form = options.get("form", "softmax")
    model = encoder(form)
    companion = encoder(form, seed=1) if "teacher" in options.values() else None
    engine = engine_for(model, companion=companion, **options)
    batch = pairs(captions=2 if options.get("targets") in ("multi", "slots", "listed") else 1)
    optimizer = torch.optim.AdamW(engine.parameters(), lr=3e-3)
    losses = []
    for step in range(12):
        optimizer.zero_grad(set_to_none=True)
        losses.append(engine.update([batch], Clock(step, 20)).loss)
        optimizer.step()
        engine.commit()
    assert all(loss == loss and abs(loss) < 1e4 for loss in losses)
    if "queue" in options:  # the queue fills with the same few pairs, which are then their own negatives
        assert int(engine.objectives[0].objective.filled) == 20
    else:
        assert losses[-1] < losses[0] * 0.97


@pytest.mark.parametrize(("options", "message"), [
    ({"keep_ratio": 0.5}, "late-max"),
    ({"decoupled": True, "form": "sigmoid"}, "decoupled is of form"),
    ({"negative_weight": 0.5}, "negative_weight is of form"),
    ({"queue": 8, "similarity": "late-max"}, "queue is of form"),
    ({"queue": 8, "gather": "ring"}, "queue is of form"),
    ({"gather": "ring", "similarity": "mutual-guided"}, 'gather = "ring" is of similarity'),
    ({"gather": "ring", "form": "sigmoid", "smoothing": 0.1}, 'gather = "ring" is of similarity'),
    ({"teacher": "t", "exclude_similar": 0.5}, "do not go together"),
    ({"exclude": "group", "targets": "groups"}, 'wants targets = "diagonal"'),
    ({"keys": "t"}, "set queue"),
    ({"smooth_by": "noise"}, "smooth_by scales smoothing"),
    ({"smooth_by": "noise", "smoothing": 0.1, "form": "sigmoid", "gather": "ring"}, 'gather = "ring" is of similarity'),
    ({"targets": "listed"}, "go together"),
    ({"shares": "share"}, "go together"),
    ({"targets": "listed", "shares": "s", "similarity": "late-max"}, 'targets = "listed" is of similarity'),
    ({"targets": "listed", "shares": "s", "form": "sigmoid", "smoothing": 0.1}, "neither smoothing nor negative_weight"),
    ({"targets": "listed", "shares": "s", "queue": 8}, "queue is of form"),
    ({"teacher_top": 3}, "teacher_top wants a teacher"),
    ({"teacher_top": 3, "teacher": "t", "targets": "groups"}, "teacher_top wants a teacher"),
    ({"teacher_top": 3, "teacher": "t", "gather": "ring"}, "teacher_top wants a teacher"),
])
def test_wrong_combinations_are_named(options, message):
    with pytest.raises(ValidationError, match=message):
        ContrastiveOptions.model_validate(options)


def views(n, columns=None, width=6):
    torch.manual_seed(3)
    owner = torch.arange(n) if columns is None else columns
    sides = {"image": torch.arange(n), "text": owner}
    scale = torch.tensor(2.0)
    return Views({
        f"model/{name}": Outputs(index, torch.ones(len(index), dtype=torch.bool), torch.randn(len(index), width), log_scale=scale)
        for name, index in sides.items()
    })


def context(n):
    return Context(pairs(n), SingleProcess())


def terms_of(given, n, **options):
    return ContrastiveOptions.model_validate(options).build(BuildContext(encoder()))(given, context(n))


def test_slots_are_the_mean_of_one_infonce_a_slot():
    given = views(6, torch.arange(6).repeat_interleave(2))
    terms = terms_of(given, 6, targets="slots")
    x, y = (normalise(given[key].embedding) for key in ("model/image", "model/text"))
    parts = [sum(ops.contrastive_softmax(x, y[k::2], torch.tensor(2.0))) / 2 for k in range(2)]
    torch.testing.assert_close(terms.values, (parts[0] + parts[1]) / 2)


def test_a_sample_without_a_column_in_a_slot_has_the_mean_of_its_own():
    owner = torch.tensor([0, 0, 1, 2, 2, 3])
    given = views(5, owner)
    terms = terms_of(given, 5, targets="slots")
    assert terms.sample_index.tolist() == [0, 1, 2, 3]  # the last picture has no text
    x, y = (normalise(given[key].embedding) for key in ("model/image", "model/text"))
    first = sum(ops.contrastive_softmax(x[:4], y[[0, 2, 3, 5]], torch.tensor(2.0))) / 2
    second = sum(ops.contrastive_softmax(x[[0, 2]], y[[1, 4]], torch.tensor(2.0))) / 2
    expected = torch.stack([(first[0] + second[0]) / 2, first[1], (first[2] + second[1]) / 2, first[3]])
    torch.testing.assert_close(terms.values, expected)


def test_multi_has_every_column_of_the_sample_as_a_positive():
    owner = torch.tensor([2, 0, 1, 0, 2, 2])
    given = views(3, owner)
    terms = terms_of(given, 3, targets="multi", direction="rows")
    x, y = (normalise(given[key].embedding) for key in ("model/image", "model/text"))
    log_p = torch.log_softmax(torch.tensor(2.0).exp() * x @ y.T, 1)
    expected = torch.stack([-log_p[i, owner == i].mean() for i in range(3)])
    torch.testing.assert_close(terms.values, expected)


@pytest.mark.parametrize("options", [{"targets": "groups"}, {"exclude": "group"}])
def test_groups_are_those_of_the_samples_that_have_rows(options):
    """Neither stream has a row of sample 0: pairs keep the groups of their own samples."""
    batch, model = pairs(), encoder()
    left_out = batch.samples(1, 12)
    streams = {name: batch[name].rows(batch[name].sample_index > 0) for name in ("image", "text")}
    objective = ContrastiveOptions.model_validate(options).build(BuildContext(model))
    values = []
    for one in (left_out, batch.with_streams(streams)):
        wanted = {name: frozenset({"embedding"}) for name in ("image", "text")}
        views = Views({f"model/{key}": out for key, out in model.encode(one, wanted).items()})
        values.append(objective(views, Context(one, SingleProcess())).values)
    torch.testing.assert_close(values[0], values[1])


def test_queue_holds_the_newest_and_counts_as_negatives():
    options = ContrastiveOptions.model_validate({"queue": 5})
    objective = options.build(BuildContext(encoder()))
    objective.queue_rows, objective.queue_columns = torch.zeros(5, 6), torch.zeros(5, 6)
    given = views(3)
    before = objective(given, context(3)).values
    plain = terms_of(given, 3).values
    torch.testing.assert_close(before, plain)  # nothing is held yet
    objective.commit(given, context(3))
    assert int(objective.filled) == 3
    torch.testing.assert_close(objective.queue_rows[:3], normalise(given["model/image"].embedding))
    assert (objective(given, context(3)).values > plain).all()
    objective.commit(given, context(3))
    assert int(objective.filled) == 5


def test_weights_are_those_of_the_stream():
    terms = terms_of(views(12), 12, weights="trust")
    torch.testing.assert_close(terms.weights, torch.linspace(0.2, 1.0, 12))


@pytest.mark.parametrize("gradient", ["rows", "columns"])
def test_one_side_alone_gets_a_gradient(gradient):
    given = views(4)
    for view in given.values():
        view.embedding.requires_grad_()
    terms_of(given, 4, gradient=gradient).values.sum().backward()
    got = {key.removeprefix("model/"): view.embedding.grad is not None for key, view in given.items()}
    assert got == {"image": gradient == "rows", "text": gradient == "columns"}


def gradients(engine):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in engine.parameters()]


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_ring_of_ranks_gives_the_gradients_of_the_gathered_update(form, size):
    whole = pairs(13)
    alone = engine_for(encoder(form), form=form)
    expected = alone.update([whole], Clock(0, 9)).loss
    ends = [0, 4, 13] if size == 2 else [0, 6, 7, 13]

    def work(communicator):
        part = whole.samples(ends[communicator.rank], ends[communicator.rank + 1])
        engine = engine_for(models[communicator.rank], communicator, form=form, gather="ring")
        return engine.update([part], Clock(0, 9)).loss, gradients(engine)

    models = [encoder(form) for _ in range(size)]
    for loss, got in Threads(size).run(work):
        assert loss == pytest.approx(expected, rel=1e-5)
        for a, b in zip(got, gradients(alone)):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6)


def test_filip_keeps_its_share_of_tokens_before_they_are_gathered():
    model = encoder()
    objective = ContrastiveOptions.model_validate({"similarity": "late-max", "keep_ratio": 0.5}).build(BuildContext(model))
    batch = pairs(5)
    outputs = model.encode(batch, {"image": frozenset({"tokens"}), "text": frozenset({"tokens"})})
    given = objective.prepare(Views({f"model/{key}": value for key, value in outputs.items()}), Context(batch, SingleProcess()))
    assert given["model/image"].tokens.shape == (5, 2, 16)
    longest = outputs["text"].tokens.shape[1]
    assert given["model/text"].tokens.shape[1] == -(-longest // 2)
    assert (given["model/text"].token_mask.sum(1) <= outputs["text"].token_mask.sum(1)).all()
