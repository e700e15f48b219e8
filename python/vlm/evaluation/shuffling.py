"""Controls that show whether a model uses its picture: the picture of another sample, or none.

n samples. Source: limber (the shuffled-image control).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlm.config.errors import DataError
from vlm.evaluation.bootstrap import cluster_ids

Control = Literal["shuffled", "none"]
"""shuffled: every sample gets a picture of another concept; none: the question stands without a picture."""

Integers = NDArray[np.int64]


def derangement(concepts: Sequence[Hashable], seed: int) -> tuple[Integers, bool]:
    """(giver [n], whether it is a permutation): sample i gets the picture of giver[i], of another concept than its own.

    Each picture is given once, unless one concept has more than half of the samples: then no permutation exists, and
    its samples draw from the pictures of all others with replacement. None is a concept of its own each time.
    Raises DataError when all samples are of one concept.
    """
    ids = cluster_ids(concepts)
    n = len(ids)
    groups = int(ids.max()) + 1 if n else 0
    if groups < 2:
        raise DataError(
            "pictures cannot be shuffled: all samples are of one concept",
            remedy='leave "shuffled" out of the controls, or evaluate on more data',
        )
    generator = np.random.default_rng([seed, 6])
    # Groups stand together, in random order and each in random order: a shift by the size of the largest leaves
    # every group behind, as long as that is at most half of all.
    place = generator.permutation(groups)[ids]
    order = np.lexsort((generator.random(n), place))
    most = int(np.bincount(ids).max())
    giver = np.empty(n, dtype=np.int64)
    if 2 * most <= n:
        giver[order] = np.roll(order, -most)
        return giver, True
    large = int(np.bincount(ids).argmax())
    inside, outside = np.flatnonzero(ids == large), np.flatnonzero(ids != large)
    giver[inside] = generator.choice(outside, size=len(inside))
    giver[outside] = generator.choice(inside, size=len(outside), replace=False)
    return giver, False
