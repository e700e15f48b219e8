"""Weights of tokens and samples, documents as terms, short lists of a teacher, gradients made later: in float64."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from tests.objectives.toys import (
    CLOCK,
    Expanding,
    apply,
    batch_of,
    engine_of,
    gradients,
    logits_by_hand,
    loss_of,
    mixed_batch,
    packed,
    pictures,
    targets_by_hand,
    tokens,
    view_of,
)
from vlm.objectives import BuildContext, DistillOptions, TokenCrossEntropyOptions
from vlm.types import Context, Features, Labels, SingleProcess, Views
from vlm.types.layout import IGNORE

RATES = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.0])


def weighted(batch=None, zeros=True):
    """The mixed batch with `importance` (a number a token, some 0) and `trust` (a number a sample)."""
    batch = mixed_batch() if batch is None else batch
    text = batch["text"]
    generator = torch.Generator().manual_seed(2)
    numbers = torch.randint(0 if zeros else 1, 5, text.values.shape, generator=generator) / 4
    streams = {
        "importance": Features(numbers, text.mask, text.sample_index),
        "trust": Labels(RATES[: len(batch)], torch.ones(len(batch), dtype=torch.bool), torch.arange(len(batch))),
    }
    return batch.with_streams(streams)


def by_hand(model, batch, unit="causal"):
    """[(sample, segment, weight, cross-entropy)] of the targets in order. A placeholder is no target, so the tokens of a row and the
    labels of its layout are the same list."""
    view = view_of(model, batch)
    logits, layout, text, told, found = logits_by_hand(view), view.layout, batch["text"], {}, []
    for row in range(len(text)):
        labelled = (layout.mask[row] & (layout.label[row] != IGNORE)).nonzero()[:, 0].tolist()
        weights = batch["importance"].values[row][text.mask[row] & text.supervised[row]].tolist()
        told |= {(row, t): weight for t, weight in zip(labelled, weights, strict=True)}
    for row, at, t in targets_by_hand(layout, unit):
        ce = F.cross_entropy(logits[row, at], layout.label[row, t])
        found.append((int(layout.sample_index[row]), (row, int(layout.segment[row, t])), told[row, t], ce))
    return found


@pytest.mark.parametrize("kept", [None, (0, 2)])
@pytest.mark.parametrize("unit", ["causal", "masked"])
def test_core_ce_weights_of_tokens(unit, kept):
    model, batch = Expanding(1, kept=kept), weighted()
    _, terms = apply(TokenCrossEntropyOptions(unit=unit, weights="importance"), batch, model)  # checks `count` too
    targets = [t for t in by_hand(model, batch, unit) if t[2] > 0]
    assert len(targets) < len(by_hand(model, batch, unit))  # some are left out
    assert torch.allclose(terms.values, torch.stack([t[3] for t in targets]), atol=1e-12)
    assert terms.weights.tolist() == [t[2] for t in targets]
    assert float(terms.scalars["nats"]) == pytest.approx(float(loss_of(terms).detach()), abs=1e-12)


@pytest.mark.parametrize("name", ["importance", "trust"])
@pytest.mark.parametrize("per", ["token", "document", "sample"])
def test_core_ce_weights_count_within_a_term_or_between_terms(per, name):
    model, batch = Expanding(1), weighted()
    _, terms = apply(TokenCrossEntropyOptions(per=per, weights=name), batch, model)
    groups = {}
    for sample, document, weight, ce in by_hand(model, batch):
        weight = weight if name == "importance" else float(RATES[sample])
        key = {"token": len(groups), "document": document, "sample": sample}[per]
        if weight > 0:
            groups.setdefault(key, []).append((weight, ce, sample))
    means = [sum(w * ce for w, ce, _ in g) / sum(w for w, _, _ in g) for g in groups.values()]
    between = [1.0 if name == "importance" and per != "token" else g[0][0] for g in groups.values()]
    expected = (sum(m * b for m, b in zip(means, between)) / sum(between)).detach()
    assert float(loss_of(terms).detach()) == pytest.approx(float(expected), abs=1e-12)
    assert float(terms.scalars["nats"]) == pytest.approx(float(expected), abs=1e-12)
    if per == "sample":
        assert terms.sample_index.tolist() == [0, 1, 2, 3, 4]


def test_lwm_documents_of_a_packed_row_weigh_alike():
    (_, one), (_, two) = (apply(TokenCrossEntropyOptions(per="document"), batch, Expanding(1)) for batch in packed())
    assert torch.allclose(one.values, two.values, atol=1e-12)
    assert one.weights.tolist() == [1, 1]
    assert one.sample_index.tolist() == [0, 0]
    (_, tokens_) = apply(TokenCrossEntropyOptions(), packed()[0], Expanding(1))
    expected = torch.stack([tokens_.values[:4].mean(), tokens_.values[4:].mean()])
    assert torch.allclose(one.values, expected, atol=1e-12)


@pytest.mark.parametrize("per", ["token", "document", "sample"])
@pytest.mark.parametrize("options", [
    TokenCrossEntropyOptions(weights="importance", smoothing=0.1, z_loss=1e-2, report="modality"),
    TokenCrossEntropyOptions(weights="trust", gradients="recompute"),
    DistillOptions(target="logits", weights="importance", teacher_top=5, temperature=2.0),
    DistillOptions(target="logits", weights="trust", direction="skew", gradients="recompute"),
], ids=lambda o: f"{o.kind}-{o.weights}")
def test_micro_batches_do_not_matter(per, options):
    if per == "document" and options.kind == "distill":
        per = "sample"
    options = options.model_copy(update={"per": per})
    found = []
    for parts in (1, 4):
        model, teacher = Expanding(1), Expanding(5)
        batches = [weighted()] if parts == 1 else weighted().split(parts)
        update = engine_of(model, [options], teacher=teacher).update(batches, CLOCK)
        found.append((update.loss, gradients(model)))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-7)
    for name, gradient in found[0][1].items():
        assert torch.allclose(gradient, found[1][1][name], atol=1e-7), name


def test_equal_weights_are_none_and_a_cap_is_the_models():
    model, batch = Expanding(1, softcap=2.0), mixed_batch()
    batch = batch.with_streams({"importance": Features(torch.ones(batch["text"].values.shape), batch["text"].mask, batch["text"].sample_index)})
    for per in ("token", "sample"):
        (_, plain), (_, alike) = (apply(TokenCrossEntropyOptions(per=per, weights=name), batch, model) for name in (None, "importance"))
        assert torch.equal(plain.values, alike.values)
        assert torch.equal(plain.weights, alike.weights)
    (_, capped), expected = apply(TokenCrossEntropyOptions(), batch, model), [t[3] for t in by_hand(model, batch)]
    assert torch.allclose(capped.values, torch.stack(expected), atol=1e-12)
    _, uncapped = apply(TokenCrossEntropyOptions(), batch, Expanding(1))
    assert not torch.allclose(capped.values, uncapped.values)


def test_core_ce_gradients_made_in_the_backward_pass_are_the_same():
    found = []
    for schedule in ("forward", "recompute"):
        model, batch = Expanding(1), weighted()
        _, terms = apply(TokenCrossEntropyOptions(gradients=schedule, weights="importance", smoothing=0.1), batch, model)
        loss_of(terms).backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-12), name


def test_all_weights_0_are_a_loss_of_0():
    batch = mixed_batch()
    text = batch["text"]
    batch = batch.with_streams({"importance": Features(torch.zeros(text.values.shape), text.mask, text.sample_index)})
    for per in ("token", "document", "sample"):
        _, terms = apply(TokenCrossEntropyOptions(per=per, weights="importance"), batch, Expanding(1))
        assert float(terms.weights.sum()) == 0
        assert float(terms.scalars["nats"]) == 0
        terms.total().backward()


def test_weights_that_do_not_fit_are_named():
    batch, model = weighted(), Expanding(1)
    text = batch["text"]
    for values, message in ((torch.ones(5, 3), "one number a token"), (torch.full(text.values.shape, -1.0), "not negative"),
                            (torch.full(text.values.shape, torch.nan), "finite")):
        mask = text.mask if values.shape == text.values.shape else torch.ones(5, dtype=torch.bool)
        wrong = batch.with_streams({"importance": Features(values, mask, text.sample_index)})
        with pytest.raises(ValueError, match=message):
            apply(TokenCrossEntropyOptions(weights="importance"), wrong, model)


@pytest.mark.parametrize("name", [None, "importance", "trust"])
@pytest.mark.parametrize("per", ["token", "sample"])
@pytest.mark.parametrize("top", [3, 99])
def test_core_ce_a_teachers_likeliest_ids(top, per, name):
    student, teacher, batch = Expanding(1, softcap=3.0), Expanding(5, vocab=37), weighted()
    options = DistillOptions(target="logits", teacher_top=top, per=per, temperature=2.0, weights=name)
    _, terms = apply(options, batch, student, teacher=teacher)
    views = [view_of(model, batch) for model in (student, teacher)]
    s, t = (logits_by_hand(view).detach() / 2.0 for view in views)
    t = torch.full_like(t, -torch.inf).scatter(2, t.topk(min(top, 37), 2).indices, 0.0) + t
    s = s.log_softmax(-1)[..., :37]
    q = t.softmax(-1)
    values = torch.where(q > 0, q * (t.log_softmax(-1).clamp(min=-1e9) - s), 0.0).sum(-1)
    layout, groups = views[0].layout, {}
    for row in range(len(batch["text"])):
        told = iter(batch["importance"].values[row][batch["text"].mask[row] & batch["text"].supervised[row]].tolist())
        for at in (layout.label[row] != IGNORE).nonzero().flatten().tolist():
            weight = {None: 1.0, "importance": next(told), "trust": float(RATES[row])}[name]
            if weight > 0:
                groups.setdefault(row if per == "sample" else len(groups), []).append((weight, float(values[row, at - 1]), row))
    means = [sum(w * v for w, v, _ in g) / sum(w for w, _, _ in g) for g in groups.values()]
    between = [1.0 if name != "trust" and per == "sample" else g[0][0] for g in groups.values()]
    assert float(loss_of(terms).detach()) == pytest.approx(sum(m * b for m, b in zip(means, between)) / sum(between), abs=1e-9)


def test_a_short_list_of_all_ids_is_the_whole_divergence():
    student, teacher, batch = Expanding(1), Expanding(5), mixed_batch()
    (_, whole), (_, listed) = (apply(DistillOptions(target="logits", teacher_top=top), batch, student, teacher=teacher) for top in (0, 40))
    assert torch.allclose(whole.values, listed.values, atol=1e-12)


@pytest.mark.parametrize(("options", "message"), [
    ({"target": "logits", "at": "visual", "weights": "w"}, "at answers"),
    ({"target": "feature", "weights": "w"}, "at answers"),
    ({"target": "logits", "teacher_top": 3, "direction": "js"}, "need all ids"),
    ({"target": "similarity", "teacher_top": 3}, "teacher_top is of target"),
])
def test_wrong_combinations_are_named(options, message):
    with pytest.raises(ValidationError, match=message):
        DistillOptions.model_validate(options)


def test_the_objective_asks_for_its_stream():
    assert TokenCrossEntropyOptions(weights="w").build(BuildContext(Expanding(1))).reads == ("w",)
    options = DistillOptions(target="logits", weights="w")
    assert options.build(BuildContext(Expanding(1), {"teacher": Expanding(2)})).reads == ("w",)


def test_targets_that_a_model_left_out_are_named():
    batch, model = batch_of(1, text=tokens([[1, 9, 10, 2]], [3]), image=pictures([])), Expanding(1)
    batch = weighted(batch, zeros=False)
    objective = TokenCrossEntropyOptions(weights="importance").build(BuildContext(model))
    view = view_of(model, batch)
    view.layout.label[0, 2] = IGNORE
    with pytest.raises(ValueError, match="left out targets"):
        objective(Views({"model/text": view}), Context(batch, SingleProcess()))
