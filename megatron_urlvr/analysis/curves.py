"""Curves over training steps: their start, peak and end, and what these amount to, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MIN_CHANGE = 0.03
"""The least change of an accuracy that a verdict calls a change, whatever its standard error."""
COLLAPSED = 0.05
"""A run that fell and ends below this accuracy has collapsed."""
END_WINDOW = 5
"""Steps at either end whose mean counts as the start and the end of a training metric: a single batch is noise."""


@dataclass(frozen=True)
class Curve:
    """One metric over the steps that have it. `steps` and `values`: `[T]`, steps increasing."""

    steps: IntArray
    values: FloatArray

    def __len__(self) -> int:
        return len(self.steps)

    def at(self, step: int) -> float:
        """The value at `step`. KeyError if the metric was not logged there."""
        where = np.flatnonzero(self.steps == step)
        if not len(where):
            raise KeyError(step)
        return float(self.values[where[0]])


@dataclass(frozen=True)
class Summary:
    """Start, peak and end of an accuracy curve, and what they amount to."""

    start: float
    start_step: int
    peak: float
    peak_step: int
    """The earliest step that has the highest value."""
    end: float
    end_step: int
    tolerance: float
    """Changes up to this are not called changes."""

    @property
    def rose(self) -> bool:
        """The peak is above the start by more than the tolerance."""
        return self.peak - self.start > self.tolerance

    @property
    def fell(self) -> bool:
        """The end is below the peak by more than the tolerance."""
        return self.peak - self.end > self.tolerance

    @property
    def verdict(self) -> str:
        """The curve in words, see docs/report.md: `rose and held`, `rose and collapsed`, `fell`, `flat`, ..."""
        if self.start_step == self.end_step:
            return "one evaluation"
        if not self.fell:
            return "rose and held" if self.rose else "flat"
        if self.end < COLLAPSED:
            return "rose and collapsed" if self.rose else "collapsed"
        if not self.rose:
            return "fell"
        if self.end < self.start - self.tolerance:
            return "rose and fell below its start"
        if self.end <= self.start + self.tolerance:
            return "rose and fell back to its start"
        return "rose and fell part of the way"


def summarize(curve: Curve, standard_errors: FloatArray | None = None) -> Summary:
    """Start, peak and end of `curve`. ValueError when it is empty.

    The tolerance is three standard errors of one evaluation (the largest of `standard_errors`, `[T]`), which is about
    two of the difference of two evaluations; at least MIN_CHANGE. The peak is the highest of many noisy values, and so
    biased upwards: `analysis.peaks` measures it without that bias where there are two sets of problems.
    """
    if not len(curve):
        raise ValueError("an empty curve has no start, peak or end")
    noise = float(np.nanmax(standard_errors)) if standard_errors is not None and len(standard_errors) else 0.0
    peak = int(np.argmax(curve.values))
    return Summary(
        start=float(curve.values[0]),
        start_step=int(curve.steps[0]),
        peak=float(curve.values[peak]),
        peak_step=int(curve.steps[peak]),
        end=float(curve.values[-1]),
        end_step=int(curve.steps[-1]),
        tolerance=max(MIN_CHANGE, 3 * noise),
    )


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean of `curves` over the steps that all of them have."""
    steps = reduce(np.intersect1d, [curve.steps for curve in curves])
    values = [curve.values[np.isin(curve.steps, steps)] for curve in curves]
    return Curve(steps, np.mean(values, axis=0) if len(steps) else np.empty(0))


def ends(curve: Curve) -> tuple[float, float]:
    """Means of the first and the last END_WINDOW values. ValueError when the curve is empty."""
    if not len(curve):
        raise ValueError("an empty curve has no ends")
    return float(curve.values[:END_WINDOW].mean()), float(curve.values[-END_WINDOW:].mean())
