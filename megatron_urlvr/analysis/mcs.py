"""The Model Collapse Step: when label-free training on votes is over, and whether that predicts what labels would add.

The paper's definition (arXiv 2603.08660, section 4): the first training step whose reward accuracy under majority votes
is below 1 %, without smoothing or patience. Reward accuracy goes to 1 and not to 0 when nothing can be parsed any more
(no reward and no truth agree), so the same step is also measured on the vote's precision, and without labels as the
onset that the collapse detector finds. A run that never gets there is censored at its last step.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from megatron_urlvr.config.monitor import CollapseSection
from megatron_urlvr.monitor.collapse import replay

from .curves import Curve, FloatArray
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
    windows = np.lib.stride_tricks.sliding_window_view(curve.values, smoothing)
    # sums rounded once, on both sides: a mean at the threshold itself must not fall below it by rounding
    below = np.array([math.fsum(window) < threshold * smoothing for window in windows])
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
class BaseConcordance:
    """Concordance of one evaluation of the untrained base with a gain, on the pairs that collapse steps can order."""

    c: float | None
    """Share of those pairs in which the base that evaluates higher gains more; None without such pairs."""
    low: float | None
    high: float | None
    difference: float | None
    """C of the steps minus this one: above 0, the step says more than the base did before any training."""
    difference_low: float | None
    difference_high: float | None


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
    base: dict[str, BaseConcordance] = field(default_factory=dict)
    """By evaluation of the base: what it predicts on the same pairs and draws."""


def comparable_pairs(steps: ArrayLike, censored: ArrayLike) -> FloatArray:
    """`[n, n]`, 1 where the first policy of the pair is known to collapse before the second (Harrell et al., JAMA 247,
    1982): it collapsed, at a smaller step, or at an equal one where the other is censored."""
    time, unseen = np.asarray(steps, dtype=np.float64), np.asarray(censored, dtype=bool)
    outlives = (time[:, None] < time[None, :]) | ((time[:, None] == time[None, :]) & unseen[None, :])
    return (outlives & ~unseen[:, None]).astype(np.float64)


def concordance(
    steps: Sequence[float],
    censored: Sequence[bool],
    gains: Sequence[float],
    clusters: Sequence[Hashable],
    base: Mapping[str, Sequence[float]] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Concordance:
    """Harrell's C for "collapses later, gains more", and for each of `base` C for "evaluates higher, gains more" on the
    same pairs. Ties in gain or evaluation count one half.

    Percentile intervals from resampling whole clusters, the same draws for all: policies from one pretraining run are
    not independent of each other. Draws without a comparable pair are left out.
    """
    names = list(dict.fromkeys(clusters))
    member = np.array([[cluster == name for name in names] for cluster in clusters], dtype=np.float64)
    taken = _draws(len(names), resamples, seed)

    def summed(pairs: FloatArray) -> FloatArray:
        """Sum of `[n, n]` in the sample and in each draw, where a cluster counts as often as it was taken."""
        return np.einsum("rk,kl,rl->r", taken, member.T @ pairs @ member, taken)

    earlier, gained = comparable_pairs(steps, censored), _order(gains)
    comparable = summed(earlier)
    kept = comparable > 0
    by_step = summed(earlier * (1 + gained) / 2)[kept] / comparable[kept]
    found = {}
    for name, scores in (base or {}).items():
        by_base = summed(earlier * (1 + _order(scores) * gained) / 2)[kept] / comparable[kept]
        found[name] = BaseConcordance(*_interval(by_base, level), *_interval(by_step - by_base, level))
    return Concordance(
        *_interval(by_step, level), pairs=int(comparable[0]), policies=len(steps), clusters=len(names), base=found
    )


def _draws(clusters: int, resamples: int, seed: int) -> FloatArray:
    """`[1 + resamples, clusters]`: how often each cluster is taken, in the sample (once) and in draws from it. One
    cluster has no spread, and no draws."""
    if clusters == 1:
        return np.ones((1, 1))
    drawn = np.random.default_rng(seed).integers(clusters, size=(resamples, clusters))
    counts = (drawn[:, :, None] == np.arange(clusters)).sum(axis=1)
    return np.concatenate([np.ones((1, clusters)), counts])


def _order(values: ArrayLike) -> FloatArray:
    """`[n, n]`: 1 where the second of a pair is higher, -1 where the first is, 0 where they tie."""
    value = np.asarray(values, dtype=np.float64)
    return np.sign(value[None, :] - value[:, None])


def _interval(found: FloatArray, level: float) -> tuple[float | None, float | None, float | None]:
    """(value, low, high) of the sample's value followed by the draws'; None for what is not there."""
    if len(found) < 2:
        return (float(found[0]) if len(found) else None), None, None
    low, high = np.quantile(found[1:], [(1 - level) / 2, (1 + level) / 2])
    return float(found[0]), float(low), float(high)


def supervised_gain(run: RunRecord, eval_set: str) -> float | None:
    """Sampled accuracy at the end minus at the start of a run with labels; None where the set was not measured, or the
    run has not come to its end."""
    if run.status.get("state") not in ("done", "stopped"):
        return None
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
    steps: FloatArray = np.array([each.step for each in found], dtype=np.float64)
    return float(steps.mean()), sum(each.censored for each in found)
