"""Choice between a true caption and a wrong one, and pairs of pictures."""

import json

import numpy as np
import pytest

from vlm.config.errors import DataError
from vlm.data.scene_swap import swaps
from vlm.evaluation.compositional import CompositionalOptions, choices_of, compositional, pair_scores
from vlm.evaluation.encoder import open_model
from vlm.evaluation.session import evaluate

TEXTS = [
    "a red circle left of a blue square",
    "a green star",
    "a small ring above a large arrow",
    "a red cross and a pink star",
    "a lamp next to a bed",
]


class Vectors(dict):
    """Every text has a direction of its own, drawn by what it says."""

    def __init__(self):
        super().__init__({"": [1.0] * 6})

    def __missing__(self, text):
        return self.setdefault(text, np.random.default_rng(list(text.encode())).normal(size=6))


def drawn(material, seed=0, fields=None, texts=TEXTS):
    images = np.random.default_rng(seed).normal(size=(len(texts), 6))
    return material(images, texts, fields=fields, table=Vectors())


@pytest.mark.parametrize("seed", range(3))
def test_structure_clip_accuracy_equals_brute_force_over_the_choices(material, seed):
    m = drawn(material, seed)
    options = CompositionalOptions(seed=seed, resamples=100)
    result = compositional(m, options)
    right = {"relation": [], "attribute": []}
    for choice in choices_of(m, options):
        assert choice.wrong in {one.text for one in swaps(choice.true, (choice.kind,))}
        true, wrong = m.embed_texts([choice.true, choice.wrong])
        right[choice.kind].append(m.images[choice.sample] @ true > m.images[choice.sample] @ wrong)
    assert [len(right[kind]) for kind in right] == [2, 3]
    for kind, hits in right.items():
        assert result.metrics[kind] == pytest.approx(100 * np.mean(hits))
        assert result.intervals[kind]["lower"] <= result.metrics[kind] <= result.intervals[kind]["upper"]
    everything = right["relation"] + right["attribute"]
    assert result.metrics["accuracy"] == pytest.approx(100 * np.mean(everything))
    assert result.chance["accuracy"] == result.chance["relation"] == 50.0
    assert result.details["choices_of"] == {"relation": 2, "attribute": 3}
    assert result.samples == 3
    over = result.metrics["accuracy"] - result.metrics["shuffled"]["accuracy"]
    assert result.metrics["over_shuffled"]["accuracy"] == pytest.approx(over, abs=1e-5)


def test_what_the_texts_alone_tell_shows_with_another_picture(material):
    table = Vectors()
    for text in TEXTS:  # captions lie where pictures are, wrong ones do not: no picture is needed
        table[text] = [1, 0, 0, 0, 0, 0]
        for one in swaps(text):
            table[one.text] = [0, 1, 0, 0, 0, 0]
    m = material([[1, 0, 0.1, 0, 0, 0]] * len(TEXTS), TEXTS, table=table)
    result = compositional(m, CompositionalOptions(resamples=100))
    assert result.metrics["accuracy"] == result.metrics["shuffled"]["accuracy"] == 100.0
    assert result.metrics["over_shuffled"]["accuracy"] == 0.0


def test_ties_count_against_the_model(material):
    same = Vectors()
    m = material(np.eye(6)[:5], TEXTS, table=same)
    for said in [*TEXTS, *(one.text for true in TEXTS for one in swaps(true))]:
        same[said] = [1, 1, 1, 1, 1, 1]
    assert compositional(m, CompositionalOptions(resamples=100)).metrics["accuracy"] == 0.0


def test_another_true_caption_of_the_sample_is_not_wrong(material):
    both = [("a red circle and a blue square", "a blue circle and a red square")]
    with pytest.raises(DataError, match="no caption can be made wrong"):
        compositional(drawn(material, texts=both), CompositionalOptions(resamples=100))


def test_modes_say_what_is_exchanged_and_one_concept_has_no_control(material):
    m = drawn(material, fields=[{"concept": "one"}] * len(TEXTS))
    result = compositional(m, CompositionalOptions(modes=("relation",), resamples=100))
    assert set(result.metrics) == {"accuracy", "relation"}
    assert result.details["clusters"] == 1


def test_wrong_captions_may_be_fields_of_the_data(material):
    fields = [{"order": "square circle", "verb": "  "}, {"order": "a star, green", "verb": "a green tree"}, {}, {}, {"order": TEXTS[4]}]
    m = drawn(material, fields=fields)
    result = compositional(m, CompositionalOptions(wrong_from=("order", "verb"), resamples=100))
    assert result.details["choices_of"] == {"order": 2, "verb": 1}
    assert set(result.chance) == {"accuracy", "order", "verb", "shuffled", "over_shuffled"}


@pytest.mark.parametrize("options", [{"wrong_from": "x", "modes": ["relation"]}, {"wrong_from": "pairs"}])
def test_settings_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match="modes|wrong_from"):
        CompositionalOptions.model_validate(options)


def test_structure_clip_pairs_are_scored_by_text_by_picture_and_as_a_group():
    scores = pair_scores(np.array([
        [[2, 1], [1, 2]],  # all right
        [[2, 1], [3, 4]],  # each picture finds its text, the first text prefers the second picture
        [[2, 3], [1, 4]],  # each text finds its picture, the first picture prefers the second text
        [[1, 1], [1, 1]],  # ties are wrong
        [[1, 2], [2, 1]],
    ], dtype=np.float32))  # fmt: skip
    assert scores.tolist() == [[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_pairs_are_samples_that_share_a_field(material):
    texts = ["a cat sees a dog", "a dog sees a cat", "a man on a horse", "a horse on a man", "alone", "same", "same"]
    names = ["p", "p", 7, 7, "q", "r", "r"]
    m = drawn(material, texts=texts, fields=[{"pair": name} for name in names])
    result = compositional(m, CompositionalOptions(pairs_from="pair", resamples=100))
    rows = m.embed_texts(texts)
    expected = pair_scores(np.stack([m.images[i : i + 2] @ rows[i : i + 2].T for i in (0, 2)])).mean(0) * 100
    assert [result.metrics["pairs"][name] for name in ("text", "image", "group")] == pytest.approx(expected.tolist())
    assert result.chance["pairs"]["group"] == pytest.approx(100 / 6, abs=1e-5)
    assert result.details["pairs"] == 2
    with pytest.raises(DataError, match="3 samples have the pair"):
        compositional(drawn(material, texts=texts, fields=[{"pair": "p"}] * 3 + [{}] * 4), CompositionalOptions(pairs_from="pair"))


def test_examples_are_drawn_by_the_seed_whatever_their_outcome(material):
    m = drawn(material)
    options = CompositionalOptions(examples=3, resamples=100)
    one, two = (compositional(m, options).examples for _ in range(2))
    assert len(one) == 3
    assert one == two
    assert {"kind", "true", "wrong", "right"} <= set(one[0])
    json.dumps(one)


def test_any_dual_encoder_can_be_asked_about_drawn_scenes(tiny_dual):
    _, _, directory = tiny_dual
    task = CompositionalOptions(limit=20, resamples=100)
    [result] = evaluate(open_model(directory, threads=1), [task], "scenes:?n=60&split=test")
    assert result.details["choices"] > 0
    assert 0 <= result.metrics["accuracy"] <= 100
    json.dumps(result.as_json())
