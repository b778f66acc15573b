"""How good the collapse detector is, run by run: when it would have stopped, and what labels say about that.

metrics.jsonl ─► rule (the detector, or a plain threshold) ─► stopping step ─┐
evaluations (labels) ─► best checkpoint, end ────────────────────────────────┴─► loss, kept share, false alarms
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from megatron_urlvr.config.monitor import CollapseSection
from megatron_urlvr.monitor.collapse import Verdict, replay

from .curves import Curve
from .runs import RunRecord

CONFIRMED_GAIN = 0.05
"""A run gained something to be kept when its best checkpoint is above its start by more than this."""

Rule = Callable[[Sequence[Mapping[str, Any]]], int | None]
"""From the rows of a run to the step whose weights it would end with; None to train to the end."""


@dataclass(frozen=True)
class Detection:
    """One run under one rule. Accuracies are those of the first evaluation set; None without evaluations."""

    run: str
    stop: int | None
    """Step whose weights are kept; None: no alarm, and the last step's are."""
    verdict: Verdict | None
    """The detector's, for the detector."""
    start: float | None = None
    best: float | None = None
    kept: float | None = None
    """At the last evaluation up to `stop` (from the end without one)."""
    end: float | None = None
    collapsing: bool | None = None
    """By labels: the end is below the best by more than the tolerance."""

    @property
    def loss(self) -> float | None:
        """Accuracy lost against the best checkpoint."""
        return None if self.best is None or self.kept is None else self.best - self.kept

    @property
    def kept_share(self) -> float | None:
        """Kept share of the gain of the best checkpoint; None where that is not above CONFIRMED_GAIN."""
        if self.start is None or self.best is None or self.kept is None or self.best - self.start <= CONFIRMED_GAIN:
            return None
        return (self.kept - self.start) / (self.best - self.start)


def detector_rule(settings: CollapseSection) -> Rule:
    """The snapshot that `action: rollback` would go back to: two steps before the onset."""

    def stop(rows: Sequence[Mapping[str, Any]]) -> int | None:
        verdicts = replay(rows, settings)
        onset = verdicts[-1].onset if verdicts else None
        return None if onset is None else max(onset - 2, 0)

    return stop


def fixed_step(step: int) -> Rule:
    """Always the same step."""
    return lambda rows: step if rows and int(rows[-1]["step"]) > step else None


def threshold(metric: str, limit: float, *, below: bool) -> Rule:
    """The step before `metric` first is at or beyond `limit`."""

    def stop(rows: Sequence[Mapping[str, Any]]) -> int | None:
        for row in rows:
            value = row.get(metric)
            if value is not None and (value <= limit if below else value >= limit):
                return max(int(row["step"]) - 1, 0)
        return None

    return stop


def detect(run: RunRecord, rule: Rule, settings: CollapseSection | None = None) -> Detection:
    """What `rule` makes of a run; with `settings`, the detector's verdict too."""
    stop = rule(run.rows)
    verdicts = replay(run.rows, settings) if settings is not None else []
    verdict = verdicts[-1] if verdicts else None
    summary = run.summary(run.eval_sets[0]) if run.eval_sets else None
    if summary is None:
        return Detection(run.label, stop, verdict)
    curve, _ = run.accuracy(run.eval_sets[0])
    return Detection(
        run=run.label,
        stop=stop,
        verdict=verdict,
        start=summary.start,
        best=summary.peak,
        kept=_at_or_before(curve, stop) if stop is not None else summary.end,
        end=summary.end,
        collapsing=summary.fell,
    )


def _at_or_before(curve: Curve, step: int) -> float:
    """Value of the last evaluation up to `step`; the first one's where there is none."""
    earlier = curve.values[curve.steps <= step]
    return float(earlier[-1] if len(earlier) else curve.values[0])


@dataclass(frozen=True)
class Account:
    """A rule over many runs."""

    healthy: int
    false_alarms: int
    false_alarm_interval: tuple[float, float]
    """95 %, exact."""
    collapsing: int
    detected: int
    median_loss: float | None
    """Over collapsing runs, accuracy lost against the best checkpoint."""
    median_kept_share: float | None
    """Over collapsing runs with a confirmed gain."""
    with_gain: int


def account(found: Sequence[Detection]) -> Account:
    """False alarms over the healthy runs, detections and losses over the collapsing ones, by labels."""
    healthy = [each for each in found if each.collapsing is False]
    dying = [each for each in found if each.collapsing]
    alarms = sum(each.stop is not None for each in healthy)
    losses = [each.loss for each in dying if each.loss is not None]
    shares = [share for each in dying if (share := each.kept_share) is not None]
    return Account(
        healthy=len(healthy),
        false_alarms=alarms,
        false_alarm_interval=exact_interval(alarms, len(healthy)),
        collapsing=len(dying),
        detected=sum(each.stop is not None for each in dying),
        median_loss=median(losses) if losses else None,
        median_kept_share=median(shares) if shares else None,
        with_gain=len(shares),
    )


def exact_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of a probability (Biometrika 26, 1934): (0, 1) without trials."""
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else _bisect(lambda p: 1 - _cdf(successes - 1, trials, p) - tail)
    high = 1.0 if successes == trials else _bisect(lambda p: tail - _cdf(successes, trials, p))
    return low, high


def _cdf(k: int, n: int, p: float) -> float:
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def _bisect(rising: Callable[[float], float]) -> float:
    """Where a rising function of a probability crosses 0."""
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
