"""Packed documents in a language model: what packing must not change. Source: lwm."""

import pytest
import torch

from tests.models.decoder_questions import packed_rows, states
from tests.models.model_makers import batch_of, language, random_rows, rows_of
from vlm.objectives import BuildContext, TokenCrossEntropyOptions
from vlm.types import Context, SingleProcess, Views

SIZES = [9, 2, 17, 5]
WINDOWED = dict(kind="exact", mask=[{"kind": "lambda", "window": 6, "sinks": 2}])
KINDS = pytest.mark.parametrize("attention", [None, WINDOWED], ids=["plain", "windowed"])


def loss_and_gradients(model, options, batch):
    objective = options.build(BuildContext(model, {}))
    view = model.encode(batch, {"text": frozenset({"vocabulary"})})["text"]
    terms = objective(Views({"model/text": view}), Context(batch, SingleProcess()))
    loss = terms.total() / terms.weights.sum()
    return loss, torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)


@KINDS
@pytest.mark.parametrize("per", ["document", "token"])
def test_lwm_packed_rows_have_the_loss_and_gradients_of_padded_ones(attention, per):
    """Tokens of a document weigh 1 / (tokens of it), so the mean is one over documents of their means; or all tokens weigh alike."""
    model, lists = language(attention=attention), random_rows(SIZES)
    every = [[1] * size for size in SIZES]
    packed = batch_of(1, text=packed_rows(lists, supervised=every, position=[range(size) for size in SIZES]))
    padded = batch_of(len(SIZES), text=rows_of(lists, extra=2, supervised=every))
    one, first = loss_and_gradients(model, TokenCrossEntropyOptions(per=per), packed)
    two, second = loss_and_gradients(model, TokenCrossEntropyOptions(per=per), padded)
    assert float(one.detach()) == pytest.approx(float(two.detach()), rel=1e-6)
    assert any(g.abs().max() > 1e-3 for g in first)
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(a, b, atol=2e-6)


@KINDS
@torch.no_grad()
def test_lwm_permuted_documents_of_a_packed_row_permute_their_outputs(attention):
    model, lists, order = language(attention=attention), random_rows(SIZES), [2, 0, 3, 1]

    def by_document(numbers):
        x = states(model, packed_rows([lists[n] for n in numbers], position=[range(SIZES[n]) for n in numbers])).x[0]
        sizes = [SIZES[n] for n in numbers]
        return dict(zip(numbers, x[: sum(sizes)].split(sizes), strict=True))

    one, other = by_document([0, 1, 2, 3]), by_document(order)
    for number in range(4):
        assert torch.allclose(one[number], other[number], atol=1e-5)
