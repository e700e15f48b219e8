"""The probe: optimal fit, honest splits, separable data."""

import numpy as np
import pytest

from vlm.config.errors import DataError
from vlm.evaluation.linear_probe import LinearProbeOptions, fit, linear_probe, predict, split_by_concept

FAST = {"penalties": (1e-3, 1e-1), "iterations": 100}


def blobs(n, classes, spread, seed):
    generator = np.random.default_rng(seed)
    centres = np.eye(8)[:classes]
    y = generator.integers(0, classes, n)
    return centres[y] + spread * generator.normal(size=(n, 8)), y


def test_fit_reaches_the_minimum():
    x, y = blobs(80, 3, 0.5, 0)
    weight = fit(x, y, 3, 0.1, iterations=300)

    def loss(w):
        logits = x @ w[:, :-1].T + w[:, -1]
        logits -= logits.max(1, keepdims=True)
        chosen = logits[np.arange(len(y)), y] - np.log(np.exp(logits).sum(1))
        return -chosen.mean() + 0.05 * (w[:, :-1] ** 2).sum()

    logits = x @ weight[:, :-1].T + weight[:, -1]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    gradient = p.T @ x / len(y) + 0.1 * weight[:, :-1]
    assert np.abs(gradient).max() < 1e-6
    generator = np.random.default_rng(1)
    for _ in range(5):
        assert loss(weight) < loss(weight + 1e-2 * generator.normal(size=weight.shape))


def test_separable_data_is_answered_by_folds(material):
    x, y = blobs(120, 4, 0.02, 1)
    fields = [{"label": f"class {c}", "concept": i // 2} for i, c in enumerate(y)]
    result = linear_probe(material(x, ["t"] * 120, fields), None, LinearProbeOptions(folds=3, **FAST))
    assert result.metrics["top1"] == 100.0
    assert result.intervals["top1"]["lower"] > 90
    assert result.chance["top1"] == pytest.approx(100 * np.bincount(y).max() / 120)
    assert result.details["clusters"] == 60
    assert result.details["protocol"] == "3 folds by concept"


def test_noise_is_not_learned_when_concepts_are_kept_apart(material):
    # Every concept has its own random direction and class: only a split that leaks concepts could do well.
    generator = np.random.default_rng(2)
    centres, classes = generator.normal(size=(60, 8)), generator.integers(0, 4, 60)
    x = np.repeat(centres, 4, axis=0) + 0.01 * generator.normal(size=(240, 8))
    fields = [{"label": str(c), "concept": i} for i, c in enumerate(classes) for _ in range(4)]
    result = linear_probe(material(x, ["t"] * 240, fields), None, LinearProbeOptions(folds=4, **FAST))
    assert result.metrics["top1"] < 50
    assert result.intervals["top1"]["lower"] < 25


def test_separate_training_data_and_classes_it_never_saw(material):
    x, y = blobs(90, 3, 0.02, 3)
    train = material(x, ["t"] * 90, [{"category": str(c)} for c in y])
    test_x, test_y = blobs(40, 3, 0.02, 4)
    labels = [str(c) for c in test_y]
    labels[:4] = ["never seen"] * 4
    test = material(test_x, ["t"] * 40, [{"category": label} for label in labels])
    result = linear_probe(test, train, LinearProbeOptions(**FAST))
    assert result.metrics["top1"] == 90.0
    assert result.details["unseen_classes"] == 4
    assert result.details["labels_from"] == "category"


def test_split_keeps_concepts_whole_and_both_sides_filled():
    concepts = [i // 3 for i in range(30)]
    held = split_by_concept(concepts, 0.2, np.random.default_rng(0))
    assert held.sum() == 6
    assert all(len(set(held[3 * i : 3 * i + 3])) == 1 for i in range(10))
    with pytest.raises(DataError, match="one concept"):
        split_by_concept(["x"] * 4, 0.5, np.random.default_rng(0))


def test_no_labels_names_the_fields(material):
    with pytest.raises(DataError, match="no sample has a class in 'kind'") as caught:
        linear_probe(
            material([[1, 0]], ["t"], [{"style": "noto"}]), None, LinearProbeOptions(labels_from="kind")
        )
    assert "style" in str(caught.value)


def test_predict_takes_the_greatest_logit():
    weight = np.array([[1.0, 0, 0], [0, 1.0, 0.5]])
    assert predict(np.array([[2.0, 1.0], [0.0, 0.0]]), weight).tolist() == [0, 1]
