"""Agreement of two models whose answers are known, token by token."""

import math

import numpy as np
import pytest

from tests.evaluation.colour_generator import SURE, ColourGenerator, colour_shard
from vlm.config.errors import RequestError
from vlm.evaluation import AgreementOptions
from vlm.evaluation.agreement import agreement, divergence
from vlm.evaluation.session import Session
from vlm.evaluation.table import table_of

OPTIONS = AgreementOptions(other="teacher", prompt="describe the picture", resamples=200)


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return colour_shard(tmp_path_factory.mktemp("agreement") / "a.tar")


def compared(uri, student, teacher, batch=64, options=OPTIONS):
    session = Session(student, uri)
    return agreement(session.pictured(session.data_of(None), None, 0), teacher, options, batch)


def test_llava_kd_a_model_agrees_with_itself(uri):
    result = compared(uri, ColourGenerator(), ColourGenerator())
    assert result.metrics == {"same_answer": 100, "same_token": 100, "divergence": 0}
    assert result.details["tokens"] == 24 * 4


def test_llava_kd_disagreement_by_hand(uri):
    result = compared(uri, ColourGenerator({"blue": "green"}), ColourGenerator())
    # One colour of four, one of the four tokens of its captions.
    assert result.metrics["same_answer"] == 75
    assert result.metrics["same_token"] == pytest.approx(100 * 15 / 16)
    vocabulary = ColourGenerator().vocab_size
    sure, unsure = math.exp(SURE) / (math.exp(SURE) + vocabulary - 1), 1 / (math.exp(SURE) + vocabulary - 1)
    assert result.metrics["divergence"] == pytest.approx((sure - unsure) * SURE / 16, abs=1e-6)
    assert "percent" in table_of(result)


def test_answers_of_different_lengths_and_any_batch_agree_alike(uri):
    class Short(ColourGenerator):
        def answer(self, prompt):
            words = super().answer(prompt)
            return words[:1] if self.colour(prompt) == "red" else words

    first = compared(uri, ColourGenerator({"white": "red"}), Short())
    assert first.details["tokens"] == 6 * 2 + 18 * 4
    assert compared(uri, ColourGenerator({"white": "red"}), Short(), batch=5).metrics == first.metrics
    # The student goes on where the teacher ends: red answers differ in the end token.
    assert first.metrics["same_answer"] == 50
    cut = OPTIONS.model_copy(update={"max_new_tokens": 1})
    assert compared(uri, ColourGenerator({"white": "red"}), Short(), options=cut).metrics["same_answer"] == 100


def test_divergence_by_hand_and_with_tokens_ruled_out():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert divergence(np.log(p)[None] + 3, np.log(q)[None] - 7)[0] == pytest.approx(expected)
    masked = np.array([[0.0, -np.inf, 1.0]])
    assert divergence(masked, masked)[0] == 0
    assert np.isfinite(divergence(masked, np.zeros((1, 3)))).all()


def test_other_vocabularies_and_models_that_do_not_write_are_refused(uri, tiny_dual):
    other = ColourGenerator()
    other.vocabulary = [*other.vocabulary, "more"]
    other.vocab_size += 1
    with pytest.raises(RequestError, match="token by token"):
        compared(uri, ColourGenerator(), other)
    options = OPTIONS.model_copy(update={"other": str(tiny_dual[2])})
    with pytest.raises(RequestError, match="writes nothing"):
        Session(ColourGenerator(), uri).run(options)
