"""Peak minus start without the bias of picking the peak: chosen on one set of problems, measured on another.

The highest of twenty noisy evaluations lies above the true peak by a standard error or two. So the peak's step is the
argmax on the `select` set; start, peak and end are read off the disjoint `measure` set. The interval of peak - start is
a paired bootstrap: problems are resampled, each with both of its accuracies (Efron & Tibshirani, An Introduction to
the Bootstrap, 1993, ch. 13: the percentile interval).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .curves import FloatArray, IntArray
from .reading import RunError, read_objects

RESAMPLES = 10_000
_CHUNK = 256


@dataclass(frozen=True)
class ProblemAccuracy:
    """Accuracy of every problem of a set at every evaluation.

    `steps`: `[T]`, increasing. `accuracy`: `[T, P]`, the share of a problem's samples that were right.
    """

    steps: IntArray
    accuracy: FloatArray

    def at(self, step: int) -> FloatArray:
        """`[P]` at `step`. KeyError when the set was not evaluated there."""
        where = np.flatnonzero(self.steps == step)
        if not len(where):
            raise KeyError(step)
        row: FloatArray = self.accuracy[where[0]]
        return row


@dataclass(frozen=True)
class PeakStatistics:
    """Accuracies on the measuring set, and the interval of `difference = peak - start` over problems."""

    start: float
    peak_step: int
    peak: float
    end: float
    difference: float
    low: float
    high: float
    problems: int
    level: float = 0.95
    resamples: int = RESAMPLES


def evals_file(run: Path, eval_set: str) -> Path:
    """Where a run keeps the per-problem results of a set."""
    return run / "evals" / f"{eval_set}.jsonl"


def load_problem_accuracy(run: Path, eval_set: str) -> ProblemAccuracy | None:
    """Read `evals/<set>.jsonl`: a line an evaluation, `{"step", "correct": [right samples of each problem], "n"}`.

    None when the run has no such file. A last line that is still being written is passed over. RunError when it is
    broken inside or its problems change along the run.
    """
    path = evals_file(run, eval_set)
    by_step: dict[int, FloatArray] = {}
    for number, row in enumerate(read_objects(path), start=1):
        try:
            if row["n"] < 1:
                raise ValueError("n must be at least 1")
            by_step[int(row["step"])] = np.asarray(row["correct"], dtype=np.float64) / row["n"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f'{path}, line {number} is not {{"step", "correct", "n"}}: {error}') from error
    if not by_step:
        return None
    if len({row.shape for row in by_step.values()}) != 1 or next(iter(by_step.values())).ndim != 1:
        raise RunError(f"{path}: the number of problems is not the same at every step")
    steps = sorted(by_step)
    return ProblemAccuracy(np.asarray(steps, dtype=np.int64), np.stack([by_step[step] for step in steps]))


def peak_step(select: ProblemAccuracy, measure: ProblemAccuracy) -> int:
    """The step with the highest accuracy on `select`, the earliest of equals, of those that `measure` has too: a run
    that goes on may be between the evaluations of its two sets. ValueError where there is none."""
    means = np.where(np.isin(select.steps, measure.steps), select.accuracy.mean(axis=1), -1.0)
    best = int(np.argmax(means))
    if means[best] < 0:
        raise ValueError("no step was evaluated on both sets")
    return int(select.steps[best])


def bootstrap_mean_interval(
    values: FloatArray, *, seed: int, resamples: int = RESAMPLES, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` `[P]`, resampling them with replacement. Deterministic in `seed`."""
    if values.ndim != 1 or not len(values):
        raise ValueError(f"a bootstrap needs a list of at least one value, not shape {values.shape}")
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for first in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - first)
        means[first : first + rows] = values[rng.integers(len(values), size=(rows, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def peak_statistics(
    select: ProblemAccuracy, measure: ProblemAccuracy, *, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95
) -> PeakStatistics:
    """Start, peak and end on `measure`, the peak's step chosen on `select` (`peak_step`; the start counts).

    Raises ValueError when `measure` has no evaluation at the start.
    """
    chosen = peak_step(select, measure)
    try:
        start, peak = measure.at(int(select.steps[0])), measure.at(chosen)
    except KeyError as error:
        raise ValueError(f"the measuring set was not evaluated at step {error}, as the selecting set was") from error
    paired = peak - start
    low, high = bootstrap_mean_interval(paired, seed=seed, resamples=resamples, level=level)
    return PeakStatistics(
        start=float(start.mean()),
        peak_step=chosen,
        peak=float(peak.mean()),
        end=float(measure.accuracy[-1].mean()),
        difference=float(paired.mean()),
        low=low,
        high=high,
        problems=len(paired),
        level=level,
        resamples=resamples,
    )
