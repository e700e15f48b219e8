"""A linear probe on embeddings of texts."""

import numpy as np
import pytest

from vlm.config.errors import DataError, RequestError
from vlm.evaluation.linear_probe import linear_probe
from vlm.evaluation.material import BadTally, Item
from vlm.evaluation.session import Session
from vlm.evaluation.text_probe import TextProbeOptions, _material, text_probe

WORDS = ("red", "green", "blue")


class Bag:
    """Counts of three words and of letters."""

    name = "bag"

    def encode_text(self, texts):
        rows = np.array([[*(text.count(word) for word in WORDS), len(text) / 50, 0.1] for text in texts], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def tokenize(self, texts):
        return [[1] for _ in texts]

    def nats(self, ids, segment, scored):
        return np.zeros(int(scored.sum()))


def items(n=60, text=lambda word, i: f"a {word} thing number {i}"):
    return [Item(str(i), (text(WORDS[i % 3], i),), {"colour": WORDS[i % 3], "concept": i // 3, "other": "nothing"}) for i in range(n)]


def test_the_probe_is_linear_probe_on_the_embeddings_of_the_texts():
    options = TextProbeOptions(labels_from="colour", resamples=100)
    result = text_probe(Bag(), items(), None, options)
    assert (result.task, result.name, result.samples) == ("text-probe", "text-probe", 60)
    assert result.metrics["top1"] == 100.0
    assert result.chance["top1"] == pytest.approx(100 / 3, abs=1e-3)
    other = linear_probe(_material(Bag(), items(), "auto", None, BadTally()), None, options.probe())
    assert (other.metrics, other.intervals) == (result.metrics, result.intervals)


def test_another_field_says_nothing_and_training_data_may_be_given():
    options = TextProbeOptions(labels_from="colour", field="other", resamples=100)
    assert text_probe(Bag(), items(), None, options).metrics["top1"] < 60
    fitted = text_probe(Bag(), items(6), items(), TextProbeOptions(labels_from="colour", resamples=100))
    assert fitted.metrics["top1"] == 100.0
    assert fitted.details["train"]["samples"] == 60


def test_texts_that_are_absent_are_counted_and_named():
    some = [*items(), Item("gone", (), {}), Item("broken", ("x",), {}, problem="bad_json: no")]
    bad = BadTally(0.5)
    result = text_probe(Bag(), some, None, TextProbeOptions(labels_from="colour", resamples=100), bad)
    assert result.samples == 60
    assert sum(bad.as_json()["reasons"].values()) == 2 if "reasons" in bad.as_json() else bad.as_json()
    with pytest.raises(DataError):
        text_probe(Bag(), [], None, TextProbeOptions(labels_from="colour"))


def test_a_model_that_embeds_no_text_is_refused():
    class Scorer:
        name, tokenize, nats = "scorer", Bag.tokenize, Bag.nats

    with pytest.raises(RequestError, match="embeds texts"):
        Session(Scorer(), "scenes:?n=4&split=val").run(TextProbeOptions(labels_from="shape"))
