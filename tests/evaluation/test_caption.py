"""Captions of a model whose words are known: figures by hand, references, likelihood, controls."""

import math

import numpy as np
import pytest

from tests.evaluation.colour_generator import COLOURS, SURE, ColourGenerator, colour_shard
from vlm.config.errors import DataError, RunFailed
from vlm.evaluation import CaptionOptions, evaluate
from vlm.evaluation.table import table_of
from vlm.evaluation.text_metrics import bleu, cider, rouge_l

ASK = "describe the picture"


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return colour_shard(tmp_path_factory.mktemp("caption") / "a.tar")


def ask(uri, generator=None, **options):
    options = {"prompt": ASK, "resamples": 200, **options}
    return evaluate(generator or ColourGenerator(), [CaptionOptions(**options)], uri)[0]


def test_figures_are_those_of_the_pure_functions(uri):
    result = ask(uri, ColourGenerator({"blue": "green"}))
    truth = [(f"a {list(COLOURS)[i % 4]} picture",) for i in range(24)]
    said = [texts[0].replace("blue", "green") for texts in truth]
    assert result.metrics["cider"] == pytest.approx(cider(said, truth).mean(), abs=1e-5)
    assert result.metrics["bleu_1"] == pytest.approx(100 * bleu(said, truth)[0], abs=1e-4)
    assert result.metrics["bleu_4"] == 0  # captions of three words have no run of four
    assert result.metrics["rouge_l"] == pytest.approx(100 * rouge_l(said, truth).mean(), abs=1e-4)
    assert result.samples == 24
    assert result.details["distinct"] == 3
    constant = ["a red picture"] * 24
    assert result.details["constant"] == constant[0]
    assert result.chance["cider"] == pytest.approx(cider(constant, truth).mean(), abs=1e-5)
    # Without a picture it writes just that constant.
    for name, level in result.chance.items():
        assert result.metrics["none"][name] == pytest.approx(level, abs=1e-6)


def test_limber_shuffled_captions_are_worse_and_cost_more(uri):
    result = ask(uri)
    assert result.metrics["over_shuffled"]["cider"] > 0
    assert result.intervals["over_shuffled"]["cider"]["lower"] > 0
    assert result.metrics["over_shuffled"]["bits_per_character"] < 0
    # The colour is never right under another picture, everything else is.
    assert result.metrics["shuffled"]["rouge_l"] == pytest.approx(200 / 3, abs=1e-4)
    assert {"caption/cider", "caption/shuffled/cider", "caption/over_none/nats_per_token"} <= set(result.flat())


def test_likelihood_by_hand(uri):
    result = ask(uri, controls=("none",))
    vocabulary = ColourGenerator().vocab_size
    right = math.log(math.exp(SURE) + vocabulary - 1) - SURE
    wrong = right + SURE
    assert result.metrics["nats_per_token"] == pytest.approx(right, abs=1e-6)
    # Four tokens with the end; without a picture the colour is wrong in three of four captions.
    assert result.metrics["none"]["nats_per_token"] == pytest.approx(right + SURE * 0.75 / 4, abs=1e-5)
    assert wrong > right
    characters = np.mean([len(f"a {colour} picture") for colour in COLOURS])
    assert result.metrics["bits_per_character"] == pytest.approx(4 * right / math.log(2) / characters, abs=1e-6)
    assert "nats_per_token" not in ask(uri, controls=(), likelihood=False).metrics


def test_a_model_that_cannot_score_texts_only_writes(uri):
    class Silent(ColourGenerator):
        nats = property()

    assert set(ask(uri, Silent(), controls=()).metrics) == {"cider", "bleu_1", "bleu_4", "rouge_l"}


def test_probabilities_that_are_not_finite_end_it(uri):
    class Broken(ColourGenerator):
        def nats(self, prompts, answers):
            return [np.array([np.nan])] * len(prompts)

    with pytest.raises(RunFailed, match="not finite"):
        ask(uri, Broken())


def test_references_of_other_fields(tmp_path):
    def fields(i, colour):
        return {"captions": {"de": [f"the {colour} circle", f"a {colour} picture"]}, "words": "a" if i else ""}

    uri = colour_shard(tmp_path / "a.tar", 8, fields)
    result = ask(uri, references=("absent", "captions.de"), controls=())
    assert result.details["references"] == 16
    assert result.metrics["rouge_l"] == 100
    result = ask(uri, references="words", controls=())
    assert (result.samples, result.details["without_reference"]) == (7, 1)
    with pytest.raises(DataError, match="no reference"):
        ask(uri, references="absent")


def test_pictures_of_one_concept_cannot_be_shuffled(tmp_path):
    uri = colour_shard(tmp_path / "a.tar", 4, lambda i, colour: {"caption": "the plain", "concept": 1})
    with pytest.raises(DataError, match="one concept"):
        ask(uri)
    assert ask(uri, controls=("none",)).samples == 4


def test_captions_without_a_concept_that_agree_are_not_exchanged(tmp_path):
    uri = colour_shard(tmp_path / "a.tar", 12, lambda i, colour: {"caption": f"a {colour} picture"})
    result = ask(uri)
    assert result.metrics["shuffled"]["rouge_l"] == pytest.approx(200 / 3, abs=1e-4)
    assert result.details["clusters"] == 12


def test_examples_come_from_both_halves(uri):
    result = ask(uri, ColourGenerator({"blue": "green", "white": "red"}), examples=6)
    assert [e["half"] for e in result.examples] == ["worse", "better"] * 3
    for example in result.examples:
        assert example["right"] == (example["answer"] in example["truth"])
        assert example["controls"]["none"] == "a red picture"
        assert example["question"] == ASK


def test_the_table_gives_each_figure_its_unit(uri):
    result = ask(uri, controls=("none",))
    lines = {line.strip().split("  ")[0]: line.split() for line in table_of(result).splitlines()}
    assert lines["rouge l"][2] == "100.0"
    assert lines["cider"][1] == "7.50"
    assert any(word.startswith("+") for word in lines["cider"])
    assert any(word.startswith("-") for word in lines["nats per token"])
