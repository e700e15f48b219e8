"""Preference between two answers: the exact checks of povid and stic, in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from tests.objectives.toys import (
    CLOCK,
    VOCABULARY,
    Expanding,
    apply,
    batch_of,
    engine_of,
    gradients,
    logits_by_hand,
    loss_of,
    mixed_batch,
    pictures,
    tokens,
    view_of,
    views_of,
)
from vlm.config.errors import DataError, RunFailed
from vlm.models import LanguageOptions
from vlm.objectives import BuildContext, PreferenceOptions
from vlm.types import Context, SingleProcess
from vlm.types.layout import IGNORE

PROMPTS = [[1, 3, 9], [1, 7, 8, 9], [1, 3, 11, 3], [1, 3], [1, 20, 3, 21]]
GOOD = [[10, 2], [11, 12, 2], [13, 14, 15, 16, 2], [], [17]]
BAD = [[22, 23, 24, 2], [25, 2], [13, 30, 15, 16, 2], [26], [31, 32, 33]]
TEXT = PreferenceOptions()
OWN = PreferenceOptions(
    name="own",
    rejected={"kind": "argmax", "chooser": "online", "reference_chooser": "reference", "of": "answer.preferred@image.noisy"},
)


def pair_batch(good=GOOD, bad=BAD):
    """Sample 3 has no preferred answer at all."""
    return batch_of(
        5,
        answer__preferred=tokens([p + a for p, a in zip(PROMPTS, good)], [len(a) for a in good]),
        answer__rejected=tokens([p + a for p, a in zip(PROMPTS, bad)], [len(a) for a in bad]),
        image=pictures([0, 2, 2, 3, 4]),
        image__noisy=pictures([0, 2, 2, 3, 4], seed=1),
    )


def language(seed=0):
    torch.manual_seed(seed)
    options = LanguageOptions(width=16, depth=1, heads=2, ffn_width=24, length=12)
    model = options.build(VOCABULARY).double()
    with torch.no_grad():
        model.tokens.weight.mul_(20)  # far from uniform
    return model


def by_hand(model, batch, stream, chosen=None):
    """[B] sums of log-probabilities, target by target; chosen: logits of another view, whose argmax is scored instead."""
    view = views_of(batch, [f"model/{stream}.vocabulary"], model=model)[f"model/{stream}"]
    logs, label, out = logits_by_hand(view).log_softmax(-1), view.layout.label, []
    for row in range(len(label)):
        places = [t for t in range(1, label.shape[1]) if label[row, t] != IGNORE]
        ids = [int(label[row, t]) for t in places]
        if chosen is not None:
            other = chosen.layout.label[row]
            ids = [int(logits_by_hand(chosen)[row, t - 1].argmax()) for t in range(1, len(other)) if other[t] != IGNORE]
        total = torch.zeros((), dtype=torch.float64)
        for t, token in zip(places, ids, strict=True):
            total = total + logs[row, t - 1, token]
        out.append(total.detach())
    return torch.stack(out)


@pytest.mark.parametrize("make", [language, Expanding])
def test_povid_zero_adapters_give_ln_2(make):
    model = make()
    engine = engine_of(model, [TEXT], reference=make())
    result = engine.update([pair_batch()], CLOCK)
    assert result.loss == math.log(2)
    assert result.scalars["preference/margin"] == 0
    assert sum(float(grad.abs().sum()) for grad in gradients(model).values()) > 0


def test_povid_zero_adapters_give_ln_2_for_its_own_tendency():
    engine = engine_of(Expanding(), [TEXT, OWN], reference=Expanding(), online=Expanding())
    result = engine.update([pair_batch()], CLOCK)
    assert result.losses == {"preference": math.log(2), "own": math.log(2)}


def test_povid_scores_equal_a_direct_log_softmax():
    batch, model, reference, online = pair_batch(), Expanding(1), Expanding(2), Expanding(3)
    good, bad = by_hand(model, batch, "answer.preferred"), by_hand(model, batch, "answer.rejected")
    reference_good = by_hand(reference, batch, "answer.preferred")
    reference_bad = by_hand(reference, batch, "answer.rejected")
    live = torch.tensor([True, True, True, False, True])
    logit = 0.1 * ((good - bad) - (reference_good - reference_bad))
    _, terms = apply(TEXT, batch, model, reference=reference)
    assert torch.equal(terms.weights > 0, live)
    assert torch.allclose(terms.values[live], -F.logsigmoid(logit)[live], atol=1e-12)
    assert float(terms.scalars["margin"]) == pytest.approx(float(logit[live].mean()), abs=1e-12)
    assert float(terms.scalars["accuracy"]) == pytest.approx(float((logit[live] > 0).double().mean()))
    assert float(terms.scalars["reward_preferred"]) == pytest.approx(float(0.1 * (good - reference_good)[live].mean()), abs=1e-12)
    assert float(terms.scalars["reward_rejected"]) == pytest.approx(float(0.1 * (bad - reference_bad)[live].mean()), abs=1e-12)
    _, terms = apply(TEXT.model_copy(update={"loss": "hinge", "beta": 0.5}), batch, model, reference=reference)
    assert torch.allclose(terms.values[live], (1 - 5 * logit).clamp(min=0)[live], atol=1e-12)
    _, terms = apply(PreferenceOptions(reference="none"), batch, model)
    assert torch.allclose(terms.values[live], -F.logsigmoid(0.1 * (good - bad))[live], atol=1e-12)
    noisy = {
        who: view_of(one, batch, "answer.preferred@image.noisy")
        for who, one in (("online", online), ("reference", reference))
    }
    own = by_hand(model, batch, "answer.preferred", noisy["online"])
    reference_own = by_hand(reference, batch, "answer.preferred", noisy["reference"])
    _, terms = apply(OWN, batch, model, reference=reference, online=online)
    expected = -F.logsigmoid(0.1 * ((good - own) - (reference_good - reference_own)))
    assert torch.allclose(terms.values[live], expected[live], atol=1e-12)


@pytest.mark.parametrize("make", [language, Expanding])
def test_povid_rejected_equal_to_preferred_gives_ln_2_and_no_gradient(make):
    model = make(1)
    engine = engine_of(model, [TEXT], reference=make(2))
    result = engine.update([pair_batch(bad=GOOD)], CLOCK)
    assert result.loss == pytest.approx(math.log(2), abs=1e-14)
    assert max(float(grad.abs().max()) for grad in gradients(model).values()) < 1e-12


def test_povid_swapping_the_answers_mirrors_the_logit():
    _, terms = apply(TEXT, pair_batch(), Expanding(1), reference=Expanding(2))
    _, swapped = apply(TEXT, pair_batch(BAD, GOOD), Expanding(1), reference=Expanding(2))
    live = terms.weights > 0
    assert float(swapped.scalars["margin"]) == pytest.approx(-float(terms.scalars["margin"]), abs=1e-12)
    # sigmoid(x) + sigmoid(-x) = 1
    assert torch.allclose((-terms.values[live]).exp() + (-swapped.values[live]).exp(), torch.ones(4).double(), atol=1e-12)


def test_povid_a_longer_answer_is_summed():
    """Where every position has one distribution, an answer of three targets has three times the score of one."""
    model = Expanding(1)
    with torch.no_grad():
        for parameter in (model.embed.weight, model.see.weight, model.see.bias, model.mix.weight):
            parameter.zero_()
    good, bad = [[9, 9, 9]] * 5, [[9]] * 5
    _, terms = apply(PreferenceOptions(reference="none", beta=1.0), pair_batch(good, bad), model)
    rewards = terms.scalars["reward_preferred"], terms.scalars["reward_rejected"]
    assert float(rewards[0]) == pytest.approx(3 * float(rewards[1]), abs=1e-12)


def test_povid_no_gradient_reaches_the_reference_or_a_chooser():
    model, reference, online = Expanding(1), Expanding(2), Expanding(3)
    for options in (TEXT, OWN):
        companions = {"reference": reference} | ({"online": online} if options is OWN else {})
        _, terms = apply(options, pair_batch(), model, **companions)
        loss_of(terms).backward()
    assert gradients(model)
    assert not gradients(reference)
    assert not gradients(online)


@pytest.mark.parametrize("nll", [0.0, 0.5])
@pytest.mark.parametrize("parts", [2, 5])
def test_povid_micro_batches_equal_one_batch(parts, nll):
    entries = [TEXT.model_copy(update={"nll": nll}), OWN.model_copy(update={"weight": 0.5})]
    model, again = Expanding(1), Expanding(1)
    companions = {"reference": Expanding(2), "online": Expanding(3)}
    first = engine_of(model, entries, **companions).update([pair_batch()], CLOCK)
    second = engine_of(again, entries, **companions).update(pair_batch().split(parts), CLOCK)
    assert first.loss == pytest.approx(second.loss, abs=1e-12)
    assert first.scalars == pytest.approx(second.scalars, abs=1e-12)
    for name, grad in gradients(model).items():
        assert torch.allclose(grad, gradients(again)[name], atol=1e-12)


def test_povid_micro_batches_equal_one_batch_for_a_language_model():
    model, again = language(1), language(1)
    first = engine_of(model, [TEXT], reference=language(2)).update([pair_batch()], CLOCK)
    second = engine_of(again, [TEXT], reference=language(2)).update(pair_batch().split(2), CLOCK)
    assert first.loss == pytest.approx(second.loss, abs=1e-10)
    for name, grad in gradients(model).items():
        assert torch.allclose(grad, gradients(again)[name], atol=1e-6)  # the trunk norms in float32


def test_povid_no_noise_chooses_the_clean_argmax():
    """The score of the rejected answer is then the sum of the greatest log-probabilities: never below the preferred one."""
    batch, model = pair_batch(), Expanding(1)
    batch = batch.with_streams({"image.noisy": batch["image"]})
    _, terms = apply(OWN.model_copy(update={"reference": None}), batch, model, online=copy.deepcopy(model))
    view = view_of(model, batch, "answer.preferred")
    logs, label = logits_by_hand(view).log_softmax(-1).max(-1).values, view.layout.label
    greatest = torch.stack([logs[row, :-1][label[row, 1:] != IGNORE].sum() for row in range(5)])
    logit = 0.1 * (by_hand(model, batch, "answer.preferred") - greatest)
    live = terms.weights > 0
    assert torch.allclose(terms.values[live], -F.logsigmoid(logit)[live], atol=1e-12)
    assert float(terms.scalars["accuracy"]) == 0


def test_povid_tokens_are_laid_on_the_clean_view_target_by_target():
    """A chooser whose pictures take other positions says the same tokens, at other places of its row."""
    batch, model = pair_batch(), Expanding(1)
    chooser = Expanding(3, positions=5)
    view = view_of(chooser, batch, "answer.preferred@image.noisy")
    good, own = by_hand(model, batch, "answer.preferred"), by_hand(model, batch, "answer.preferred", view)
    _, terms = apply(OWN.model_copy(update={"reference": None}), batch, model, online=chooser)
    live = terms.weights > 0
    assert torch.allclose(terms.values[live], -F.logsigmoid(0.1 * (good - own))[live], atol=1e-12)


def test_povid_a_chooser_with_other_targets_is_refused_by_the_sample():
    batch, model = pair_batch(), Expanding(1)
    objective = OWN.model_copy(update={"reference": None}).build(BuildContext(model, {"online": model}))
    views = views_of(batch, objective.requires, model=model, online=model)
    key = "online/answer.preferred@image.noisy"
    short = [*GOOD[:2], GOOD[2][:-1], *GOOD[3:]]
    other = views_of(pair_batch(short), objective.requires, model=model, online=model)
    views[key] = other[key]
    with pytest.raises(RunFailed, match=r"k2: model/answer.preferred has 5 targets where online/\S+ has 4"):
        objective(views, Context(batch, SingleProcess()))


def test_povid_requests_name_the_picture_stream():
    objective = OWN.build(BuildContext(Expanding(), {"reference": Expanding(), "online": Expanding()}))
    assert {str(request) for request in objective.requires} == {
        "model/answer.preferred.vocabulary",
        "reference/answer.preferred.vocabulary",
        "online/answer.preferred@image.noisy.vocabulary",
        "reference/answer.preferred@image.noisy.vocabulary",
    }


def test_samples_without_a_pair_are_not_counted():
    empty = [[]] * 5
    for good, bad in ((empty, BAD), (GOOD, empty), (empty, empty)):
        _, terms = apply(TEXT, pair_batch(good, bad), Expanding(1), reference=Expanding(2))
        assert terms.weights.sum() == 0
    _, terms = apply(OWN, pair_batch(GOOD, empty), Expanding(1), reference=Expanding(2), online=Expanding(3))
    assert terms.weights.tolist() == [1, 1, 1, 0, 1]


def test_a_sample_with_two_rows_of_one_answer_is_refused():
    batch = pair_batch()
    rows = batch["answer.rejected"].rows(torch.tensor([0, 1, 2, 2, 4]))
    with pytest.raises(DataError, match=r"k2: stream 'answer.rejected' has 2 rows"):
        apply(TEXT, batch.with_streams({"answer.rejected": rows}), Expanding(1), reference=Expanding(2))


def test_impossible_combinations_are_refused():
    model = Expanding()
    both = BuildContext(model, {"reference": model, "online": model})
    cases = [
        (PreferenceOptions(reference="other"), r"\[companions.other\]"),
        (PreferenceOptions(rejected={"kind": "text", "of": "answer.preferred"}), "both 'answer.preferred'"),
        (PreferenceOptions(rejected={"kind": "argmax", "chooser": "online", "of": "text@image.noisy"}), "answer.preferred@PICTURES"),
        (PreferenceOptions(rejected={"kind": "argmax", "chooser": "x", "of": "answer.preferred@y"}), r"\[companions.x\]"),
        (PreferenceOptions(nll=1.0, nll_norm=0), "positive"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            options.build(both)


def test_stic_adds_the_likelihood_of_the_preferred_answer():
    batch, model, reference = pair_batch(), Expanding(1), Expanding(2)
    _, plain = apply(TEXT, batch, model, reference=reference)
    good, live = by_hand(model, batch, "answer.preferred"), plain.weights > 0
    _, terms = apply(TEXT.model_copy(update={"nll": 0.7}), batch, model, reference=reference)
    assert torch.allclose((terms.values - plain.values)[live], -0.7 * good[live] / 1024, atol=1e-12)
    _, terms = apply(TEXT.model_copy(update={"nll": 0.7, "nll_norm": "tokens"}), batch, model, reference=reference)
    lengths = torch.tensor([max(1, len(answer)) for answer in GOOD])
    assert torch.allclose((terms.values - plain.values)[live], (-0.7 * good / lengths)[live], atol=1e-12)


def test_stic_starts_at_ln_2_beside_the_likelihood():
    batch, model = pair_batch(), Expanding(1)
    _, terms = apply(TEXT.model_copy(update={"nll": 1.0}), batch, model, reference=copy.deepcopy(model))
    live = terms.weights > 0
    expected = math.log(2) - by_hand(model, batch, "answer.preferred") / 1024
    assert torch.allclose(terms.values[live], expected[live], atol=1e-14)


def test_the_mixed_batch_reads_a_default_stream_too():
    """Any token stream may hold the answers."""
    batch = mixed_batch()
    batch = batch.with_streams({"worse": batch["text"]})
    options = PreferenceOptions(reference="none", preferred="text", rejected={"kind": "text", "of": "worse"})
    _, terms = apply(options, batch, Expanding(1))
    assert float(loss_of(terms).detach()) == pytest.approx(math.log(2), abs=1e-14)
