"""Answers of a closed set, calibrated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.tiny_generator import IMAGE, UNKNOWN, TinyGenerator, prompt_of
from vlm.config.errors import RequestError
from vlm.runtime.generation import (
    Calibration,
    Negatives,
    answer,
    calibrate,
    label_ids,
    label_probabilities,
    with_unknown,
    without_pictures,
)
from vlm.runtime.generation.logits import softmax

PROMPTS = [prompt_of(IMAGE, 3, 4, seed=1), prompt_of(3, IMAGE, 6, IMAGE, 5, seed=2), prompt_of(IMAGE, 6, seed=3)]
IDS = [np.array([3]), np.array([4, 5]), np.array([6, 12])]

distributions = st.lists(st.floats(0.01, 1), min_size=4, max_size=4).map(lambda p: np.array(p) / sum(p))


@given(distributions)
def test_debias_lvlm_diagonal_of_equal_distributions_is_uniform(p):
    np.testing.assert_allclose(calibrate(p, p, "diagonal", 0.0), 0.25, rtol=1e-12)
    # With eps each share is off by at most eps over the smallest probability.
    np.testing.assert_allclose(calibrate(p, p, "diagonal", 1e-4), 0.25, rtol=2e-4 / p.min())


@pytest.mark.parametrize("mode", ["diagonal", "identity"])
@given(p=distributions)
def test_debias_lvlm_uniform_content_free_keeps_the_order(mode, p):
    q = calibrate(p, np.ones(4), mode)
    assert q.sum() == pytest.approx(1)
    order = np.argsort(p)
    assert (np.diff(q[order]) >= -1e-12).all()
    assert q[p.argmax()] == pytest.approx(q.max(), rel=1e-12)


@given(p=distributions, p_cf=distributions)
def test_debias_lvlm_the_affine_maps_written_out(p, p_cf):
    eps = 1e-4
    diagonal = np.linalg.inv(np.diag(p_cf + eps)) @ p
    np.testing.assert_allclose(calibrate(p, p_cf, "diagonal", eps), diagonal / diagonal.sum(), rtol=1e-9)
    identity = np.eye(4) @ p - (p_cf + eps)
    np.testing.assert_allclose(calibrate(p, p_cf, "identity", eps), softmax(identity), rtol=1e-9)


@given(p=distributions, p_cf=distributions, scale=st.floats(0.1, 10))
def test_calibration_normalises_both_first(p, p_cf, scale):
    np.testing.assert_allclose(calibrate(scale * p, p_cf / scale), calibrate(p, p_cf), rtol=1e-9)


def test_calibration_is_row_by_row_and_one_correction_serves_all():
    p = np.array([[0.7, 0.3], [0.2, 0.8]])
    p_cf = np.array([0.6, 0.4])
    np.testing.assert_allclose(calibrate(p, p_cf), [calibrate(row, p_cf) for row in p])


def test_debias_lvlm_calibration_undoes_a_bias_towards_yes():
    p, p_cf = np.array([[0.8, 0.2], [0.6, 0.4]]), np.array([0.7, 0.3])
    assert p.argmax(1).tolist() == [0, 0]
    for mode in ("diagonal", "identity"):
        assert calibrate(p, p_cf, mode).argmax(1).tolist() == [0, 1]


def test_label_tokens_are_all_that_read_as_the_label():
    pieces = ["Yes", " yes", "yes!", "no", "YES\n", "", " No ", "n"]
    found = label_ids(lambda ids: "".join(pieces[i] for i in ids), len(pieces), ["yes", "No"])
    assert [ids.tolist() for ids in found] == [[0, 1, 4], [3, 6]]


@pytest.mark.parametrize(("labels", "message"), [(["yes", "elephant"], "label 'elephant'"), (["yes", " YES"], "two labels are the same")])
def test_labels_that_cannot_be_told_are_refused(labels, message):
    with pytest.raises(RequestError, match=message):
        label_ids(lambda ids: ["yes", "no"][ids[0]], 2, labels)


def test_label_probabilities_are_sums_of_the_softmax_normalised():
    logits = (3 * np.random.default_rng(0).normal(size=(5, 13))).astype(np.float32)
    p = softmax(logits)
    sums = np.stack([p[:, ids].sum(1) for ids in IDS], axis=1)
    np.testing.assert_allclose(label_probabilities(logits, IDS), sums / sums.sum(1, keepdims=True), rtol=1e-12)
    logits[:, 0] = 3e4  # all labels together have no probability that a float64 can hold
    np.testing.assert_allclose(label_probabilities(logits, IDS), sums / sums.sum(1, keepdims=True), rtol=1e-12)


@pytest.mark.parametrize("scope", ["question", "dataset"])
@pytest.mark.parametrize("content_free", ["none", "unk", "none+unk", "noise-image"])
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_debias_lvlm_answers_are_first_tokens_with_and_without_the_picture(scope, content_free, batch_size):
    generator = TinyGenerator()
    model = generator.model
    negatives = Negatives(IMAGE, UNKNOWN, lambda prompt: {k: [-p for p in v] for k, v in prompt.pictures.items()})
    calibration = Calibration(content_free, "diagonal", 1e-4, scope)
    answers = answer(generator, PROMPTS, IDS, calibration, negatives=negatives, batch_size=batch_size)

    def read(prompt):
        return label_probabilities(model.logits(model.read(prompt)), IDS)[0]

    free = []
    for prompt in PROMPTS:
        none, unk = read(without_pictures(prompt, IMAGE)), read(with_unknown(prompt, IMAGE, UNKNOWN))
        noise = read(negatives.of(prompt, "noise-image")[0])
        free.append({"none": none, "unk": unk, "none+unk": (none + unk) / 2, "noise-image": noise}[content_free])
    if scope == "dataset":
        free = [np.mean(free, axis=0)] * len(PROMPTS)
    given = np.stack([read(p) for p in PROMPTS])
    np.testing.assert_allclose(answers.given, given, rtol=1e-9)
    np.testing.assert_allclose(answers.content_free, free, rtol=1e-9)
    np.testing.assert_allclose(answers.calibrated, calibrate(given, np.stack(free)), rtol=1e-9)


def test_no_questions_give_no_answers():
    answers = answer(TinyGenerator(), [], IDS, Calibration(scope="dataset"), negatives=Negatives(IMAGE, UNKNOWN))
    assert answers.calibrated.shape == (0, 3)


@pytest.mark.parametrize("bad", [{"content_free": "all"}, {"mode": "full"}, {"scope": "all"}, {"eps": 0.0}], ids=str)
def test_calibrations_out_of_range_are_refused_by_name(bad):
    with pytest.raises(RequestError, match=rf"calibrate\.{next(iter(bad))}: "):
        Calibration(**bad)
