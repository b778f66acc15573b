"""How well scores rank right answers above wrong ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def auroc(scores: ArrayLike, positive: ArrayLike) -> float | None:
    """Share of (positive, negative) pairs in which the positive has the higher score, ties counting 1/2.

    `scores: [n]` finite, `positive: [n]` bool. None when all are positive or none is: there is no pair.
    """
    values: NDArray[np.float64] = np.asarray(scores, dtype=np.float64)
    is_positive = np.asarray(positive, dtype=bool)
    negatives = np.sort(values[~is_positive])
    positives = values[is_positive]
    if not len(negatives) or not len(positives):
        return None
    below = np.searchsorted(negatives, positives, side="left")
    not_above = np.searchsorted(negatives, positives, side="right")
    return float((below + not_above).sum() / (2 * len(positives) * len(negatives)))
