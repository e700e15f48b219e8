"""The ranking objective: hinges against the batch, and against captions made wrong."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from tests.objectives.test_contrastive import encoder, pairs
from tests.ops.test_contrastive_ring import Threads
from vlm.layers import normalise
from vlm.models import DualEncoderOptions
from vlm.objectives import BuildContext, RankingOptions
from vlm.objectives.ranking import hinges
from vlm.training.companions import Companions
from vlm.training.engine import Clock, Engine, Weighted
from vlm.types import Context, Outputs, SingleProcess, TokenIds, Views


def built(**options):
    return RankingOptions.model_validate({"name": "ranking", **options}).build(BuildContext(encoder()))


def unit(n, seed, width=5):
    return normalise(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)))


def brute(v, t, others, margin, mean):
    """The formula of the entry, in float64, pair by pair."""
    s = v.double() @ t.double().T
    out = []
    for i in range(len(s)):
        texts = [s[i, j] for j in range(len(s)) if others[i, j]]
        pictures = [s[j, i] for j in range(len(s)) if others[j, i]]
        row = max([torch.zeros(()).double(), *(x + margin - s[i, i] for x in texts)])
        each = [max(torch.zeros(()).double(), x + margin - s[i, i]) for x in pictures]
        column = torch.zeros(()).double() if not each else sum(each) / len(each) if mean else max(each)
        out.append(row + column)
    return torch.stack(out) if out else torch.zeros(0).double()


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 13])
def test_structure_clip_hinge_equals_brute_force_over_the_off_diagonal(n, mean):
    v, t = unit(n, 1), unit(n, 2)
    others = ~torch.eye(n, dtype=torch.bool)
    got = sum(hinges(v, t, others, 0.2, mean=mean))
    torch.testing.assert_close(got.double(), brute(v, t, others, 0.2, mean), atol=1e-6, rtol=0)


def test_a_pair_without_negatives_has_the_value_0_and_a_finite_gradient():
    v, t = unit(4, 1).requires_grad_(), unit(4, 2)
    others = torch.zeros(4, 4, dtype=torch.bool)
    for mean in (False, True):
        value = sum(hinges(v, t, others, 0.2, mean=mean))
        assert value.tolist() == [0.0] * 4
        [gradient] = torch.autograd.grad(value.sum(), v)
        assert (gradient == 0).all()


def test_gradient_of_hinges():
    v, t = unit(6, 3).double().requires_grad_(), unit(6, 4).double().requires_grad_()
    others = ~torch.eye(6, dtype=torch.bool)
    for mean in (False, True):
        assert torch.autograd.gradcheck(lambda x, y, mean=mean: hinges(x, y, others, 0.2, mean=mean), (v, t))


def views_of(v, t, wrong=None, owner=None, plain=None):
    everyone = torch.arange(len(v))
    out = Views({
        "model/image": Outputs(everyone, torch.ones(len(v), dtype=torch.bool), v),
        "model/text": Outputs(torch.arange(len(t)), torch.ones(len(t), dtype=torch.bool), t, statistics={} if plain is None else {"plain": plain}),
    })
    if wrong is not None:
        out["model/text.negative"] = Outputs(owner, torch.ones(len(wrong), dtype=torch.bool), wrong)
    return out


def with_wrong(batch, owner):
    text = batch["text"]
    ids = text.values[owner].clone()
    ids[:, 1] = 49 - ids[:, 1] // 2
    stream = TokenIds(ids, text.mask[owner], text.sample_index[owner], None if text.slot is None else text.slot[owner])
    return batch.with_streams({"text.negative": stream})


def test_structure_clip_the_second_maximum_is_a_mean_while_it_warms_up():
    v, t, others = unit(8, 1), unit(8, 2), ~torch.eye(8, dtype=torch.bool)
    objective = built(mean_warmup=3)
    for step in (0, 2, 3, 10):
        terms = objective(views_of(3 * v, 0.5 * t), Context(pairs(8), SingleProcess(), step=step))
        torch.testing.assert_close(terms.values.double(), brute(v, t, others, 0.2, step < 3), atol=1e-6, rtol=0)
        assert terms.weights.tolist() == [1.0] * 8


def test_rows_of_one_group_are_no_negatives_and_a_masked_pair_is_left_out():
    v, t = unit(8, 1), unit(8, 2)
    given = views_of(v, t)
    mask = torch.arange(8) != 5
    given["model/text"] = replace(given["model/text"], mask=mask)
    terms = built(exclude="group")(given, Context(pairs(8), SingleProcess()))
    live = mask.nonzero().flatten()
    group = live // 2
    others = group[:, None] != group[None]
    torch.testing.assert_close(terms.values.double(), brute(v[live], t[live], others, 0.2, False), atol=1e-6, rtol=0)
    assert terms.sample_index.tolist() == live.tolist()


def test_structure_clip_an_equal_negative_costs_the_margin_and_a_far_one_nothing():
    v, t = unit(6, 1), unit(6, 2)
    owner = torch.tensor([0, 2, 5])
    batch = with_wrong(pairs(6), owner)
    objective = built(negatives="made", margin=0.1)
    same = objective(views_of(v, t, t[owner], owner), Context(batch, SingleProcess()))
    torch.testing.assert_close(same.values, torch.full((3,), 0.1))
    assert same.sample_index.tolist() == owner.tolist()
    far = objective(views_of(t, t, -t[owner], owner), Context(batch, SingleProcess()))
    assert far.values.tolist() == [0.0] * 3
    assert float(far.scalars["accuracy"]) == 100.0


def test_structure_clip_made_negatives_are_ranked_without_knowledge():
    v, t, known = unit(6, 1), unit(6, 2), unit(6, 3)
    owner = torch.tensor([1, 4])
    wrong = unit(2, 5)
    batch = with_wrong(pairs(6), owner)
    terms = built(negatives="made", margin=0.1)(views_of(v, t + 0.2 * known, wrong, owner, plain=t), Context(batch, SingleProcess()))
    expected = torch.relu(0.1 - (v[owner] * t[owner]).sum(1) + (v[owner] * wrong).sum(1))
    torch.testing.assert_close(terms.values, expected)


def test_made_negatives_meet_the_caption_of_their_slot_and_count_says_how_many():
    batch = pairs(5, captions=3)
    owner = torch.tensor([1, 4, 5, 13])  # rows of text: sample, slot (0, 1), (1, 1), (1, 2), (4, 1)
    batch = with_wrong(batch, owner)
    objective = built(negatives="made")
    v, t, wrong = unit(5, 1), unit(15, 2), unit(4, 3)
    given = views_of(v, v, wrong, torch.tensor([0, 1, 1, 4]))
    given["model/text"] = Outputs(torch.arange(5).repeat_interleave(3), torch.ones(15, dtype=torch.bool), t)
    terms = objective(given, Context(batch, SingleProcess()))
    picture = v[[0, 1, 1, 4]]
    torch.testing.assert_close(terms.values, torch.relu(0.2 - (picture * t[owner]).sum(1) + (picture * wrong).sum(1)))
    assert float(objective.count(batch)) == 4 == float(terms.weights.sum())
    assert float(objective.count(batch.samples(2, 4))) == 0
    none = objective(views_of(v[2:4], t[6:8], wrong[:0], owner[:0]), Context(batch.samples(2, 4), SingleProcess()))
    assert len(none.values) == 0
    image = batch["image"]
    hidden = batch.with_streams({"image": replace(image, mask=image.sample_index != 1)})
    assert float(objective.count(hidden)) == 2


def engine_for(model, communicator=None):
    options = [
        {"name": "hinge", "margin": 0.2, "exclude": "group", "mean_warmup": 1},
        {"name": "made", "negatives": "made", "margin": 0.1, "weight": 5.0},
    ]
    chosen = [RankingOptions.model_validate({"kind": "ranking", **one}) for one in options]
    weighted = [Weighted(one.name, one.build(BuildContext(model)), one.weight) for one in chosen]
    return Engine(model, weighted, Companions([]), communicator or SingleProcess(), seed=0)


def knowing(seed=0):
    """A model with knowledge, and a batch whose texts have triples: some none, of some samples no wrong caption."""
    options = encoder().options
    torch.manual_seed(seed)
    table = options.model_dump() | {"knowledge": {"weight": 0.3, "layers": 1, "triples": 2, "tokens": 3}}
    model = DualEncoderOptions.model_validate(table).build(encoder().vocabulary)
    batch = pairs(12)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(4, 50, (12, 2, 3, 3), generator=generator)
    mask = torch.rand(12, 2, 3, 3, generator=generator) > 0.3
    mask[3] = False
    batch = batch.with_streams({"text": replace(batch["text"], triples=ids, triple_mask=mask)})
    return model, with_wrong(batch, torch.tensor([0, 1, 2, 7, 11]))


def gradients(model, batches, communicator=None, step=4):
    engine = engine_for(model, communicator)
    model.zero_grad(set_to_none=True)
    result = engine.update(batches, Clock(step, 20))
    return result.loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_micro_batches_give_the_gradients_of_one_update(parts, step):
    model, batch = knowing()
    loss, expected = gradients(model, [batch], step=step)
    assert any(name.startswith("knowledge.") for name in expected)
    again, got = gradients(model, batch.split(parts), step=step)
    assert again == pytest.approx(loss, abs=1e-6)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_uneven_ranks_give_the_gradients_of_one_process():
    model, batch = knowing()
    loss, expected = gradients(model, [batch])
    bounds = [(0, 7), (7, 12)]
    models = [knowing()[0] for _ in bounds]

    def work(communicator):
        return gradients(models[communicator.rank], batch.samples(*bounds[communicator.rank]).split(2), communicator)

    for again, got in Threads(2).run(work):  # each rank has the sum over ranks
        assert again == pytest.approx(loss, abs=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_both_terms_are_learned():
    model, batch = knowing()
    engine = engine_for(model)
    optimizer = torch.optim.AdamW(engine.parameters(), lr=3e-3)
    losses = []
    for step in range(25):
        optimizer.zero_grad(set_to_none=True)
        losses.append(engine.update([batch], Clock(step, 25)).losses)
        optimizer.step()
    for name in ("hinge", "made"):
        assert losses[-1][name] < 0.6 * losses[1][name]


@pytest.mark.parametrize(("options", "message"), [
    ({"negatives": "made", "mean_warmup": 3}, "mean_warmup"),
    ({"negatives": "made", "exclude": "group"}, "exclude"),
    ({"made": "text.other"}, "made"),
    ({"margin": 3.0}, "margin"),
])
def test_settings_that_nothing_reads_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        RankingOptions.model_validate({"name": "r", **options})


def test_rows_that_are_not_pairs_are_named():
    given = views_of(unit(4, 1), unit(3, 2))
    with pytest.raises(ValueError, match="one row a sample"):
        built()(given, Context(pairs(4), SingleProcess()))
