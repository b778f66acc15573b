"""The Model Collapse Step: when label-free training on votes is over, and whether that predicts what labels would add.

The paper's definition (arXiv 2603.08660, section 4): the first training step whose reward accuracy under majority votes
is below 1 %, without smoothing or patience. Reward accuracy goes to 1 and not to 0 when nothing can be parsed any more
(no reward and no truth agree), so the same step is also measured on the vote's precision, and without labels as the
onset that the collapse detector finds. A run that never gets there is censored at its last step.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_urlvr.config.monitor import CollapseSection
from megatron_urlvr.monitor.collapse import replay

from .curves import Curve
from .runs import RunRecord

DEFINITIONS = {"reward_accuracy": "audit/vote/reward_accuracy", "precision": "audit/vote/precision"}
"""Definitions that read labels, by the metric they are on."""
LABEL_FREE = "label_free"
RESAMPLES = 2000


@dataclass(frozen=True)
class CollapseStep:
    """One run under one definition."""

    step: int
    """The Model Collapse Step, or the last step of a run that did not get there."""
    censored: bool
    tokens: float
    """Sampled until then."""


def first_below(curve: Curve, threshold: float, *, smoothing: int = 1, persistence: int = 1) -> int | None:
    """First step at which the mean of the last `smoothing` values is below `threshold`, and stays so for `persistence`
    steps (or to the end of the curve). None when that never happens.

    The first `smoothing - 1` steps have no mean yet; it is the first step of the persisting ones that is returned.
    """
    if len(curve) < smoothing:
        return None
    means = np.convolve(curve.values, np.full(smoothing, 1.0 / smoothing), mode="valid")
    below = means < threshold
    for k in np.flatnonzero(below):
        if below[k : k + persistence].all():
            return int(curve.steps[k + smoothing - 1])
    return None


def collapse_step(
    run: RunRecord, definition: str, *, threshold: float = 0.01, smoothing: int = 1, persistence: int = 1
) -> CollapseStep | None:
    """The step of a run under `reward_accuracy`, `precision` or `label_free`; None where the metric was not logged."""
    tokens = run.curve("tokens/total")
    if definition == LABEL_FREE:
        verdicts = replay(run.rows, CollapseSection())
        if not verdicts:
            return None
        found, last = verdicts[-1].onset, verdicts[-1].step
    else:
        curve = run.curve(DEFINITIONS[definition])
        if not len(curve):
            return None
        found = first_below(curve, threshold, smoothing=smoothing, persistence=persistence)
        last = int(curve.steps[-1])
    step = last if found is None else found
    spent = tokens.values[tokens.steps <= step]
    return CollapseStep(step, found is None, float(spent[-1]) if len(spent) else float("nan"))


def threshold_sweep(run: RunRecord, thresholds: Sequence[float], **rule: int) -> dict[str, dict[str, int | None]]:
    """For every definition that has one, the step under each threshold (None: never)."""
    out: dict[str, dict[str, int | None]] = {}
    for name, metric in DEFINITIONS.items():
        curve = run.curve(metric)
        if len(curve):
            out[name] = {f"{limit:g}": first_below(curve, limit, **rule) for limit in thresholds}
    return out


# -- comparison over policies -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Concordance:
    """Harrell's C of collapse steps with a gain, and its bootstrap interval over clusters."""

    c: float | None
    """Share of the comparable pairs in which the policy that collapses later gains more; None without such pairs."""
    low: float | None
    high: float | None
    pairs: int
    policies: int
    clusters: int


def harrell_c(steps: ArrayLike, censored: ArrayLike, gains: ArrayLike) -> tuple[float, float]:
    """(concordant pairs, comparable pairs): Harrell et al., JAMA 247 (1982), for "collapses later, gains more".

    A pair is comparable when the one with the smaller step collapsed (equal steps: when just one of them did, and that
    one is the earlier). Equal gains count one half.
    """
    time, unseen, gain = (np.asarray(x, dtype=np.float64) for x in (steps, censored, gains))
    earlier = (time[:, None] < time[None, :]) | ((time[:, None] == time[None, :]) & (unseen[None, :] > unseen[:, None]))
    comparable = earlier & (unseen[:, None] == 0)
    concordant = (gain[:, None] < gain[None, :]) + 0.5 * (gain[:, None] == gain[None, :])
    return float((comparable * concordant).sum()), float(comparable.sum())


def concordance(
    steps: Sequence[float],
    censored: Sequence[bool],
    gains: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Concordance:
    """Harrell's C with a percentile interval from resampling whole clusters: policies from one pretraining run are not
    independent of each other. Draws without a comparable pair are left out."""
    concordant, comparable = harrell_c(steps, censored, gains)
    names = list(dict.fromkeys(clusters))
    members = [np.array([i for i, cluster in enumerate(clusters) if cluster == name]) for name in names]
    time, unseen, gain = (np.asarray(x, dtype=np.float64) for x in (steps, censored, gains))
    draws = []
    if len(names) > 1:
        rng = np.random.default_rng(seed)
        for _ in range(resamples):
            taken = np.concatenate([members[k] for k in rng.integers(len(names), size=len(names))])
            top, bottom = harrell_c(time[taken], unseen[taken], gain[taken])
            if bottom:
                draws.append(top / bottom)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) if draws else (None, None)
    return Concordance(
        c=concordant / comparable if comparable else None,
        low=None if low is None else float(low),
        high=None if high is None else float(high),
        pairs=int(comparable),
        policies=len(steps),
        clusters=len(names),
    )


def supervised_gain(run: RunRecord, eval_set: str) -> float | None:
    """Sampled accuracy at the end minus at the start of a run with labels; None where the set was not measured."""
    curve, _ = run.accuracy(eval_set)
    return float(curve.values[-1] - curve.values[0]) if len(curve) else None


def pass_gain(run: RunRecord, eval_set: str) -> tuple[str, float] | None:
    """(`pass@k - avg@n`, its value) of the untrained base, from step 0, for the largest k that was measured."""
    prefix = f"eval/{eval_set}/pass@"
    names = (name.removeprefix(prefix) for name in run.metrics if name.startswith(prefix))
    measured = {int(name) for name in names if name.isdigit()}
    accuracy = run.accuracy_metric(eval_set)
    if not measured or accuracy is None:
        return None
    k = max(measured)
    passed, average = run.first(f"{prefix}{k}"), run.first(accuracy)
    if passed is None or average is None:
        return None
    return f"pass@{k} - {accuracy.rsplit('/', 1)[1]}", passed - average


def mean_step(found: Sequence[CollapseStep]) -> tuple[float, int]:
    """(restricted mean of the steps, number censored): a censored run counts with its last step, so that with
    censoring this is a lower bound."""
    steps: NDArray[np.float64] = np.array([each.step for each in found], dtype=np.float64)
    return float(steps.mean()), sum(each.censored for each in found)
