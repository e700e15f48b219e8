"""Retrieval against brute force, with texts shared by pictures and pictures with several texts."""

import numpy as np
import pytest

from vlm.config.errors import DataError, RunFailed
from vlm.evaluation.material import unit
from vlm.evaluation.retrieval import RetrievalOptions, distinct_texts, retrieval


def brute(images, vectors, texts, direction, k):
    """Recall at k in percent, spelt out."""
    distinct = list(dict.fromkeys(t for own in texts for t in own))
    hits = []
    if direction == "image_to_text":
        for i, own in enumerate(texts):
            scores = {t: float(images[i] @ vectors[t]) for t in distinct}
            best = max(scores[t] for t in own)
            hits.append(sum(s >= best for t, s in scores.items() if t not in own) < k)
    else:
        for t in distinct:
            scores = images @ vectors[t]
            right = [i for i, own in enumerate(texts) if t in own]
            best = max(scores[right])
            hits.append(sum(scores[i] >= best for i in range(len(images)) if i not in right) < k)
    return 100 * np.mean(hits)


@pytest.mark.parametrize("seed", range(4))
def test_recalls_equal_brute_force_when_texts_are_shared(material, seed):
    generator = np.random.default_rng(seed)
    names = [f"text {i}" for i in range(12)]
    vectors = {t: unit(generator.normal(size=(1, 6)), "text")[0] for t in names}
    texts = [tuple(generator.choice(names, size=generator.integers(1, 4), replace=False)) for _ in range(40)]
    m = material(generator.normal(size=(40, 6)), texts, table=vectors)
    result = retrieval(m, RetrievalOptions())
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            wanted = brute(m.images, vectors, texts, direction, k)
            assert result.metrics[direction][f"r@{k}"] == pytest.approx(wanted, abs=1e-5)
            bounds = result.intervals[direction][f"r@{k}"]
            assert bounds["lower"] <= wanted <= bounds["upper"]


def test_candidates_of_a_picture_are_the_distinct_texts(material):
    vectors = {"a": [1, 0], "b": [0, 1]}
    m = material([[1, 0.1]] * 3 + [[0.1, 1]], ["a", "a", "a", "b"], table=vectors)
    result = retrieval(m, RetrievalOptions())
    assert result.details["image_to_text"]["candidates"] == 2
    assert result.details["image_to_text"]["queries"] == 4
    assert result.details["text_to_image"] == {
        "queries": 2,
        "candidates": 4,
        "clusters": 2,
        "median_rank": 1.0,
    }
    assert result.metrics["image_to_text"]["r@1"] == 100.0
    # Chance: one of two texts; for pictures 3 of 4 and 1 of 4 are right.
    assert result.chance["image_to_text"]["r@1"] == 50.0
    assert result.chance["text_to_image"]["r@1"] == 50.0


def test_duplicate_pictures_with_other_texts_tie_and_count_as_misses(material):
    m = material([[1, 0], [1, 0], [0, 1]], ["a", "b", "c"], table={"a": [1, 0], "b": [1, 0], "c": [0, 1]})
    result = retrieval(m, RetrievalOptions())
    assert result.metrics["image_to_text"]["r@1"] == pytest.approx(100 / 3)
    assert result.metrics["image_to_text"]["r@5"] == 100.0


def test_texts_of_one_picture_are_drawn_together(material):
    generator = np.random.default_rng(0)
    texts = [tuple(f"{i} {k}" for k in range(5)) for i in range(20)]
    vectors, images = {}, np.eye(40)[:20]
    for i, own in enumerate(texts):  # all five find their picture, or none does
        place = i if generator.random() < 0.5 else 20 + i
        vectors |= {text: np.eye(40)[place] for text in own}
    result = retrieval(material(images, texts, table=vectors), RetrievalOptions())
    details, bounds = result.details["text_to_image"], result.intervals["text_to_image"]["r@1"]
    assert (details["queries"], details["clusters"]) == (100, 20)
    assert bounds["upper"] - bounds["lower"] > 30  # twenty coins, not a hundred


def test_interval_is_wider_by_concept(material):
    generator = np.random.default_rng(0)
    vectors = {f"t{i}": np.eye(20)[i] for i in range(20)}
    good = generator.random(20) < 0.5
    images, texts, fields = [], [], []
    for i in range(20):
        for _ in range(6):
            images.append(np.eye(20)[i if good[i] else (i + 1) % 20])
            texts.append(f"t{i}")
            fields.append({"concept": f"c{i}"})
    by_concept = retrieval(material(images, texts, fields, vectors), RetrievalOptions())
    by_sample = retrieval(material(images, texts, None, vectors), RetrievalOptions())

    def width(result):
        bounds = result.intervals["image_to_text"]["r@1"]
        return bounds["upper"] - bounds["lower"]

    assert by_concept.details["image_to_text"]["clusters"] == 20
    assert by_sample.details["image_to_text"]["clusters"] == 120
    assert width(by_concept) > 1.8 * width(by_sample)


def test_examples_are_a_seeded_draw_with_pictures_and_outcomes(material, drawn):
    vectors = {f"t{i}": np.eye(8)[i] for i in range(8)}
    images = [np.eye(8)[i if i != 3 else 4] for i in range(8)]
    m = material(images, [f"t{i}" for i in range(8)], table=vectors, reread=drawn)
    first, again = (retrieval(m, RetrievalOptions(examples=8)).examples for _ in range(2))
    assert first == again
    assert len(first) == 16
    by_query = {e["query"]: e for e in first if e["direction"] == "text_to_image"}
    assert by_query["t2"]["rank"] == 1
    assert by_query["t2"]["found"][0]["right"] is True
    assert by_query["t3"]["rank"] > 1
    assert by_query["t3"]["found"][0]["right"] is False
    assert all(
        hit["picture"].startswith("data:image/webp;base64,") for e in by_query.values() for hit in e["found"]
    )


def test_one_text_is_refused(material):
    with pytest.raises(DataError, match="1 distinct texts among 2 samples"):
        retrieval(material([[1, 0], [0, 1]], ["a", "a"], table={"a": [1, 0]}), RetrievalOptions())


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(RunFailed, match="1 of 2 picture embeddings"):
        unit(np.array([[1.0, 0.0], [np.nan, 1.0]]), "picture")


def test_distinct_texts_keeps_order_and_pairs():
    texts, pairs = distinct_texts([("b", "a"), ("a",)])
    assert texts == ["b", "a"]
    assert pairs.tolist() == [[0, 0], [0, 1], [1, 1]]
