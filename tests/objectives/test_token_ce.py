"""Cross-entropy of tokens: units, reduction by sample, report by modality, in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

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
from vlm.objectives import BuildContext, TokenCrossEntropyOptions
from vlm.objectives.vocabulary import targets_of
from vlm.ops import vocabulary_chunks
from vlm.types import Context, SingleProcess, Views
from vlm.types.layout import IGNORE, Modality
from vlm.types.vocabulary import Span, VocabularyLayout


def nats_by_sample(model, batch, unit):
    """Cross-entropies of each sample's targets, position by position."""
    view = view_of(model, batch)
    logits, layout, out = logits_by_hand(view), view.layout, [[] for _ in range(len(batch))]
    for row, at, t in targets_by_hand(layout, unit):
        out[int(layout.sample_index[row])].append(F.cross_entropy(logits[row, at], layout.label[row, t]))
    return out


def masked_batch():
    """Some tokens are replaced; what they were is their target."""
    batch = mixed_batch()
    text = batch["text"]
    ids = torch.where(text.supervised, 39, text.values)
    return batch.with_streams({"text": replace(text, values=ids, target=text.values)})


@pytest.mark.parametrize("kept", [None, (0, 2)])
@pytest.mark.parametrize("per", ["token", "sample"])
@pytest.mark.parametrize("unit", ["causal", "masked"])
def test_terms_equal_the_cross_entropy_of_full_logits(unit, per, kept):
    model, batch = Expanding(1, kept=kept), mixed_batch()
    _, terms = apply(TokenCrossEntropyOptions(unit=unit, per=per), batch, model)  # checks `count` too
    expected = nats_by_sample(model, batch, unit)
    if per == "token":
        assert torch.allclose(terms.values, torch.stack([x for sample in expected for x in sample]), atol=1e-12)
        assert (terms.weights == 1).all()
    else:
        means = torch.stack([torch.stack(x).mean() if x else torch.zeros(()).double() for x in expected])
        assert torch.allclose(terms.values, means, atol=1e-12)
        assert terms.weights.tolist() == [1, 1, 1, 0, 1]
        assert terms.sample_index.tolist() == [0, 1, 2, 3, 4]
    assert float(terms.scalars["nats"]) == pytest.approx(float(loss_of(terms).detach()), abs=1e-12)


def test_masked_reads_the_target_and_not_the_id():
    model, batch = Expanding(1), masked_batch()
    view = view_of(model, batch)
    label = torch.full_like(view.layout.label, IGNORE)
    truth = view_of(model, mixed_batch()).layout.label
    label = torch.where(truth != IGNORE, truth, label)
    views = Views({"model/text": replace(view, layout=replace(view.layout, label=label))})
    objective = TokenCrossEntropyOptions(unit="masked").build(BuildContext(model))
    terms = objective(views, Context(batch, SingleProcess()))
    expected = F.cross_entropy(logits_by_hand(view)[label != IGNORE], label[label != IGNORE], reduction="none")
    assert torch.allclose(terms.values, expected, atol=1e-12)
    assert float(objective.count(batch)) == float(terms.weights.sum()) == 9


@pytest.mark.parametrize("per", ["token", "sample"])
@pytest.mark.parametrize("unit", ["causal", "masked"])
def test_packing_two_documents_equals_two_rows(unit, per):
    (_, first), (_, second) = (apply(TokenCrossEntropyOptions(unit=unit, per=per), batch, Expanding(1)) for batch in packed())
    assert torch.allclose(first.values, second.values, atol=1e-12)
    assert torch.equal(first.weights, second.weights)
    if per == "token":
        assert len(first.values) == (6 if unit == "causal" else 8)  # the first token of a document has no predecessor


@pytest.mark.parametrize("unit", ["causal", "masked"])
def test_dynloss_one_value_a_sample_does_not_depend_on_micro_batches(unit):
    options = [TokenCrossEntropyOptions(unit=unit, per="sample", report="modality", smoothing=0.1, z_loss=1e-2)]
    model, again = Expanding(1), Expanding(1)
    first = engine_of(model, options).update([mixed_batch()], CLOCK)
    second = engine_of(again, options).update(mixed_batch().split(4), CLOCK)
    assert first.loss == pytest.approx(second.loss, abs=1e-12)
    assert first.scalars == pytest.approx(second.scalars, abs=1e-12)
    for name, grad in gradients(model).items():
        assert torch.allclose(grad, gradients(again)[name], atol=1e-12)


@pytest.mark.parametrize("per", ["token", "sample"])
def test_liquid_reports_text_and_image_codes_apart(per):
    model, batch = Expanding(1), mixed_batch()
    objective = TokenCrossEntropyOptions(per=per, report="modality").build(BuildContext(model))
    view = view_of(model, batch)
    codes = (view.layout.label >= 12) & (view.layout.modality == Modality.TEXT)
    layout = replace(view.layout, modality=torch.where(codes, int(Modality.IMAGE_CODE), view.layout.modality))
    terms = objective(Views({"model/text": replace(view, layout=layout)}), Context(batch, SingleProcess()))
    sums, shares, samples = {"text": 0.0, "image_code": 0.0}, {"text": 0.0, "image_code": 0.0}, 0
    logits = logits_by_hand(view).detach()
    for row in range(5):
        places = [t for t in range(layout.label.shape[1]) if layout.label[row, t] != IGNORE]
        samples += bool(places)
        for t in places:
            name = "image_code" if layout.label[row, t] >= 12 else "text"
            share = 1 if per == "token" else 1 / len(places)
            shares[name] += share
            sums[name] += share * float(F.cross_entropy(logits[row, t - 1], layout.label[row, t]))
    total = sum(shares.values())
    for name in sums:
        assert float(terms.scalars[f"nats_{name}"]) == pytest.approx(sums[name] / total, abs=1e-12)
        assert float(terms.scalars[f"share_{name}"]) == pytest.approx(shares[name] / total, abs=1e-12)
    assert shares["image_code"] > 0
    assert float(terms.scalars["nats"]) == pytest.approx(sum(sums.values()) / total, abs=1e-12)


@pytest.mark.parametrize("per", ["token", "sample"])
def test_a_batch_without_targets_weighs_nothing(per):
    batch = batch_of(2, text=tokens([[1, 9], [1, 3]], [0, 0]), image=pictures([1]))
    _, terms = apply(TokenCrossEntropyOptions(per=per, report="modality"), batch, Expanding(1))
    assert terms.weights.sum() == 0
    assert all(float(value) == 0 for value in terms.scalars.values())


def test_a_text_may_be_read_with_another_picture():
    batch, model = mixed_batch(), Expanding(1)
    noisy = batch.with_streams({"image": batch["image.noisy"]})
    _, named = apply(TokenCrossEntropyOptions(stream="text@image.noisy"), batch, model)
    _, swapped = apply(TokenCrossEntropyOptions(), noisy, model)
    _, clean = apply(TokenCrossEntropyOptions(), batch, model)
    assert torch.equal(named.values, swapped.values)
    assert not torch.allclose(named.values, clean.values)


@pytest.mark.parametrize("per", ["token", "sample"])
def test_spans_of_the_vocabulary_are_a_softmax_of_their_own(per):
    model, batch = Expanding(1), mixed_batch()
    model.vocabulary = VocabularyLayout({"text": Span(0, 10), "image_code": Span(10, 30)})
    view = view_of(model, batch)
    assert view.vocabulary.weight.shape[0] > 30  # a table longer than the vocabulary
    _, terms = apply(TokenCrossEntropyOptions(per=per, spans=("image_code",)), batch, model)  # checks `count` too
    logits, layout = logits_by_hand(view), view.layout
    expected = [[] for _ in range(len(batch))]
    targets = targets_of(layout)
    for row, at in zip(targets.row.tolist(), targets.position.tolist()):
        label = int(layout.label[row, at + 1])
        if 10 <= label < 30:
            expected[int(layout.sample_index[row])].append(-logits[row, at, 10:30].log_softmax(-1)[label - 10])
    found = [x for sample in expected for x in sample]
    if per == "sample":
        found = [torch.stack(x).mean() if x else torch.zeros(()).double() for x in expected]
    assert len(found) > 0
    assert torch.allclose(terms.values, torch.stack(found), atol=1e-12)
    with pytest.raises(ValueError, match="no span 'audio'"):
        TokenCrossEntropyOptions(spans=("audio",)).build(BuildContext(model))


@pytest.mark.parametrize("per", ["token", "sample"])
def test_logits_are_not_kept_and_the_forward_gradients_serve(per, monkeypatch):
    """Equal weights of tokens or samples reach the operator as one number, so that no chunk is computed twice."""
    model, batch = Expanding(1), mixed_batch()
    calls = []
    rows = vocabulary_chunks.cross_entropy_rows
    monkeypatch.setattr(vocabulary_chunks, "cross_entropy_rows", lambda *a, **k: calls.append(k["gradient"]) or rows(*a, **k))
    objective = TokenCrossEntropyOptions(per=per).build(BuildContext(model))
    views = Views({"model/text": view_of(model, batch)})
    loss_of(objective(views, Context(batch, SingleProcess()))).backward()
    assert calls == [True]
    assert gradients(model)
