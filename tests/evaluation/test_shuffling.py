"""The shuffled control never shows a sample a picture of its own concept."""

import numpy as np
import pytest

from vlm.config.errors import DataError
from vlm.evaluation.shuffling import derangement


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n", [2, 3, 7, 40])
def test_limber_shuffled_pictures_are_of_another_concept(n, seed):
    draw = np.random.default_rng(seed)
    concepts = [None if draw.random() < 0.2 else f"c{draw.integers(0, 1 + n // 2)}" for _ in range(n)]
    if len(set(concepts)) == 1 and None not in concepts:
        concepts[0] = "other"
    giver, permutes = derangement(concepts, seed)
    for i, j in enumerate(giver):
        assert i != j
        assert concepts[i] is None or concepts[i] != concepts[j]
    sizes = [concepts.count(c) if c is not None else 1 for c in concepts]
    assert permutes == (2 * max(sizes) <= n)
    if permutes:
        assert sorted(giver.tolist()) == list(range(n))


def test_a_seed_gives_one_order_and_another_seed_another():
    concepts = [i // 2 for i in range(40)]
    first, again, other = (derangement(concepts, seed)[0].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_one_concept_cannot_be_shuffled():
    for concepts in (["a"] * 5, ["a"], []):
        with pytest.raises(DataError, match="one concept"):
            derangement(concepts, 0)
