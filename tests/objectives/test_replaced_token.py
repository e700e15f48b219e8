"""Replaced-token detection: what is hidden, drawn and told, and where gradients go. Source: budget-longformer."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from tests.models.model_makers import VOCABULARY, batch_of, language, random_rows, rows_of
from vlm.models.replaced import drawn_of
from vlm.objectives import BuildContext, ReplacedTokenOptions
from vlm.types import Context, SingleProcess, Views

ENCODER = dict(causal=False, replaced={"hidden": 0.3, "width": 0.5}, attention={"mask": [{"kind": "window-symmetric", "size": 6}], "global_tokens": 1})


def parts(sizes=(17, 3, 0, 40), **options):
    model = language(**ENCODER)
    objective = ReplacedTokenOptions(**options).build(BuildContext(model))
    return model, objective, batch_of(len(sizes), text=rows_of(random_rows(sizes, low=0), extra=2))


def terms_of(objective, model, batch, seed=0):
    torch.manual_seed(seed)
    view = model.encode(batch, {"text": frozenset({"statistics"})})["text"]
    return objective(Views({"model/text": view}), Context(batch, SingleProcess())), view


def test_core_budget_longformer_labels_are_what_differs_and_nothing_beyond_hidden_tokens():
    model, objective, batch = parts()
    stream = batch["text"]
    _, view = terms_of(objective, model, batch)
    hidden, replaced = view.statistics["hidden"], view.statistics["replaced"]
    special = torch.isin(stream.values, torch.tensor(list(VOCABULARY.special.values())))
    assert not (hidden & (special | ~stream.mask)).any()
    assert not (replaced & ~hidden).any()
    assert 0 < replaced.sum() <= hidden.sum()
    share = hidden.sum() / (stream.mask & ~special).sum()
    assert 0.1 < share < 0.5
    torch.manual_seed(0)
    again = model.replacer.replace(view.layout, stream.values, model.tokens, tuple(VOCABULARY.special.values()))
    assert torch.equal(again.ids != stream.values, replaced)
    assert (view.statistics["nats"] > 0).equal(hidden)


def test_the_loss_is_that_of_the_definition_and_padding_counts_nowhere():
    model, objective, batch = parts(balance=7.0)
    terms, view = terms_of(objective, model, batch)
    mask, found = batch["text"].mask, view.statistics
    detection = F.binary_cross_entropy_with_logits(found["detection"][mask], found["replaced"][mask].float(), reduction="sum")
    expected = (found["nats"].sum() / 0.3 + 7.0 * detection) / mask.sum()
    torch.testing.assert_close(terms.total() / terms.weights.sum(), expected)
    assert objective.count(batch).item() == terms.weights.sum().item() == mask.sum().item()
    assert torch.isfinite(terms.values).all()


def test_the_encoder_reads_drawn_tokens_and_the_generator_hidden_ones():
    model, _, batch = parts()
    stream = batch["text"]
    view = terms_of(ReplacedTokenOptions().build(BuildContext(model)), model, batch)[1]
    torch.manual_seed(0)
    made = model.replacer.replace(view.layout, stream.values, model.tokens, tuple(VOCABULARY.special.values()))
    x = model.post_norm(model.trunk.run(model.tokens(made.ids), view.layout, None, False, ())[0])
    torch.testing.assert_close(view.statistics["detection"], model.replacer.detect(x))
    with torch.no_grad():
        x = model.tokens(stream.values)
        x[made.hidden] = model.replacer.mask_token
        x = model.replacer.trunk.run(model.replacer.enter(x), view.layout, None, False, ())[0]
        logits = model.replacer.leave(model.replacer.norm(x)) @ model.tokens.weight.T
    wanted = F.cross_entropy(logits[made.hidden], stream.values[made.hidden], reduction="none")
    torch.testing.assert_close(made.nats[made.hidden].detach(), wanted, atol=1e-5, rtol=1e-5)


def test_core_budget_longformer_detection_reaches_the_generator_through_the_embeddings_alone():
    model, objective, batch = parts()
    torch.manual_seed(0)
    view = model.encode(batch, {"text": frozenset({"statistics"})})["text"]
    view.statistics["detection"].square().sum().backward()
    replacer = model.replacer
    assert all(p.grad is None for part in (replacer.trunk, replacer.enter, replacer.leave, replacer.norm) for p in part.parameters())
    assert replacer.mask_token.grad is None
    assert model.tokens.weight.grad.abs().sum() > 0
    assert replacer.head[0].weight.grad.abs().sum() > 0
    model.zero_grad()
    terms_of(objective, model, batch)[0].total().backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == set()


def test_ids_are_drawn_from_the_softmax():
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 4), torch.randn(5, 4)
    drawn = drawn_of(hidden.expand(20000, 4), weight, chunk=1000)
    share = torch.bincount(drawn, minlength=5) / 20000
    assert torch.allclose(share, (hidden @ weight.T).softmax(1)[0], atol=0.015)


def test_a_generator_belongs_to_an_encoder_and_the_objective_to_a_generator():
    with pytest.raises(ValidationError, match="encoders"):
        language(replaced={})
    with pytest.raises(ValueError, match="model.replaced"):
        ReplacedTokenOptions().build(BuildContext(language(causal=False)))


@torch.no_grad()
def test_a_text_is_embedded_as_the_mean_of_its_last_states():
    model = language(causal=False)
    batch = batch_of(3, text=rows_of(random_rows([4, 0, 6]), side="left"))
    view = model.encode(batch, {"text": frozenset({"embedding", "vocabulary"})})["text"]
    for row, size in enumerate([4, 0, 6]):
        own = view.vocabulary.hidden[row, 6 - size :]
        torch.testing.assert_close(view.embedding[row], own.mean(0) if size else torch.zeros(16))
