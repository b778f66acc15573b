"""Does confidence go with correctness? For each reward, prompt by prompt: the ranking of right above wrong samples, and
the calibration of those rewards that are probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_urlvr.algorithms.ranking import auroc

from .estimators import mean_and_se

BINS = 10


def problem_aurocs(rows: Sequence[Mapping[str, Any]], label: str) -> list[float | None]:
    """AUROC of the order by the reward `label` within each problem; None where all of its samples are right, or none
    is. `rows`: of `evaluate_set` with a `Scorer`."""
    return [auroc(row["order"][label], row["right"]) for row in rows]


def alignment(rows: Sequence[Mapping[str, Any]], label: str, *, calibrated: bool, seed: int = 0) -> dict[str, float]:
    """How a reward goes with correctness over a set.

    - `auroc`, `auroc_se`: mean over problems that have right and wrong samples; the error resamples problems
    - `aligned`, `aligned_se`: share of those problems on which right samples rank above wrong ones (AUROC above 1/2;
      exactly 1/2 counts one half): what sharpening by this reward leaves better than it was
    - `left_out`: share of the problems without such a pair
    - the reward's own counts, such as `underflow`: means over problems
    - `ece`, where the reward is `calibrated` (in 0..1): expected calibration error over samples
    """
    found = problem_aurocs(rows, label)
    values = np.array([value for value in found if value is not None])
    out = {"left_out": 1 - len(values) / len(found)}
    if len(values):
        out["auroc"], out["auroc_se"] = mean_and_se(values, seed=seed)
        out["aligned"], out["aligned_se"] = mean_and_se((values > 0.5) + 0.5 * (values == 0.5), seed=seed)
    for name in rows[0]["counts"][label]:
        out[name] = float(np.mean([row["counts"][label][name] for row in rows]))
    if calibrated:
        scores = [score for row in rows for score in row["rewards"][label]]
        right = [truth for row in rows for truth in row["right"]]
        out["ece"] = expected_calibration_error(scores, right)
    return out


def expected_calibration_error(confidence: ArrayLike, right: ArrayLike, *, bins: int = BINS) -> float:
    """`sum_b n_b / n |accuracy_b - confidence_b|` over equally wide bins of 0..1 (Guo et al., arXiv 1706.04599, eq. 3).
    ValueError for confidences outside 0..1."""
    values, truth = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if values.shape != truth.shape or not len(values):
        raise ValueError(f"one truth a confidence is needed, and at least one: got {values.shape} and {truth.shape}")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"confidences must lie in 0..1, and are in {values.min():g}..{values.max():g}")
    which = np.minimum((values * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(which, weights=truth - values, minlength=bins)
    return float(np.abs(gaps).sum() / len(values))
