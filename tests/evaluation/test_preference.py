"""Pairs of answers to a model whose answers are known: who wins, by how much, by which rule."""

import numpy as np
import pytest

from tests.evaluation.colour_generator import COLOURS, SURE, ColourGenerator, colour_shard, picture_fields
from vlm.config.errors import DataError, RequestError
from vlm.data.corruption import COLORS
from vlm.evaluation import PreferenceTaskOptions, evaluate
from vlm.evaluation.preference import Pair, pairs_of, preference_figures, preference_statistics
from vlm.evaluation.session import Session
from vlm.evaluation.table import is_percent


def fields(i, colour):
    other = [c for c in COLOURS if c != colour][i % 3]
    return {**picture_fields(i, colour), "worse": f"a {other} picture"}


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return colour_shard(tmp_path_factory.mktemp("preference") / "a.tar", fields=fields)


def ask(uri, generator=None, **options):
    return evaluate(generator or ColourGenerator(), [PreferenceTaskOptions(resamples=100, **options)], uri)[0]


def test_povid_a_model_that_sees_prefers_what_is_there(uri):
    result = ask(uri, rejected="worse", controls=("shuffled", "none"))
    assert result.metrics["accuracy"] == result.metrics["given"]["accuracy"] == 100
    assert result.metrics["margin"] == pytest.approx(SURE, abs=1e-5)  # one word of three differs, by SURE in its logit
    # The picture of another concept: its colour is neither, or the worse one.
    assert result.metrics["shuffled"]["accuracy"] < 50
    # Blind it says red: right for red ones, wrong where red is the worse colour, undecided (half) elsewhere.
    reds = [(colour == "red", fields(i, colour)["worse"].split()[1] == "red") for i, colour in enumerate([*COLOURS] * 6)]
    expected = np.mean([1 if right else 0 if wrong else 0.5 for right, wrong in reds])
    assert result.metrics["none"]["accuracy"] == pytest.approx(100 * expected, abs=1e-5)
    assert result.chance == {"accuracy": 50.0}
    assert result.details["pairs"] == {"given": 24}
    assert result.details["clusters"] == 4


class Reader(ColourGenerator):
    """Knows the words that rules put in."""

    def __init__(self):
        super().__init__()
        self.vocabulary += [word for word in COLORS if word not in self.vocabulary]
        self.vocab_size = len(self.vocabulary)


def test_povid_rules_make_the_wrong_answer_and_say_which_they_were(uri):
    result = ask(uri, Reader())
    assert result.details["pairs"] == {"attribute": 24}  # a colour: there is no relation, and no second noun
    assert result.metrics["accuracy"] == result.metrics["attribute"]["accuracy"] == 100
    session = Session(ColourGenerator(), uri)
    samples = session.pictured(session.data_of(None), None, 0)
    pairs = pairs_of(samples, PreferenceTaskOptions())
    assert all(pair.right != pair.wrong for pair in pairs)
    assert pairs == pairs_of(samples, PreferenceTaskOptions())
    assert pairs != pairs_of(samples, PreferenceTaskOptions(seed=1))


def test_povid_ties_are_half_right():
    pairs = [Pair(0, "a", "b", "object"), Pair(1, "a", "b", "object"), Pair(2, "a", "b", "given")]
    rows = preference_statistics(pairs, np.array([2.0, 0.0, -1.0]), ["object", "given"])
    figures = preference_figures(["object", "given"])
    found = dict(zip(figures.paths, figures.of(rows.sum(0)).tolist()))
    assert found == pytest.approx({"accuracy": 0.5, "margin": 1 / 3, "object/accuracy": 0.75, "given/accuracy": 0.0})
    assert is_percent("preference", "object/accuracy")
    assert not is_percent("preference", "margin")


def test_no_pair_and_no_score_are_clear_errors(uri, tmp_path):
    bare = colour_shard(tmp_path / "bare.tar", 4, lambda i, colour: {"concept": colour})
    with pytest.raises(DataError, match="no answer of which a wrong one can be made"):
        ask(bare)

    class Mute(ColourGenerator):
        nats = property()

    with pytest.raises(RequestError, match="can score texts"):
        ask(uri, Mute())
