"""Says when a policy is collapsing, from metrics that need no labels: a state machine over rows of metrics.jsonl.

    a step's metrics ─► signs of degeneration, each against its own first steps ─► score ─► patience ─► verdict
                        signs of change, which runs that learn show too ───────────┘

Change alone (entropy down, majorities up, another length) is what a label-free reward is meant to do, in healthy runs
as in dying ones, and never raises the alarm. Degeneration does: one answer to every prompt, nothing to parse, responses
that are cut off or repeat themselves, a policy far from its start that agrees with itself no more than at first. Change
makes it count earlier. docs/collapse.md has the law, how the limits were chosen, and what this cannot see: confident
error that stays diverse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from megatron_urlvr.config.monitor import ONSET_STEPS, CollapseSection

MAD_TO_SIGMA = 1.4826
"""Median absolute deviation to standard deviation, of a normal distribution."""
SUPPORT = 0.1
"""What each sign of change adds to the score, as a share of it."""
AGREEMENT_GREW = 1.1
"""A majority ratio above so many times that of the first steps has grown."""
ONSET_SHARE = 0.5
"""The onset is dated back to where the score rose above this without falling below it again, at most ONSET_STEPS."""
SLOPE_STEPS = 5
"""Values that the slope of the entropy is fitted to."""

State = Literal["learning", "healthy", "suspect", "collapsing"]
"""`learning`: the first steps, which say what is normal; `suspect`: until the patience is over."""


@dataclass(frozen=True)
class Signal:
    """One sign, read from one metric."""

    name: str
    metric: str
    words: str
    """What the metric is, to begin a sentence with."""
    limit: float
    """Least change from the first steps that counts as one."""
    direction: Literal["up", "down", "either"] = "up"
    scale: Literal["difference", "log", "slope"] = "difference"
    """`log`: limits are on `ln(value / baseline)`; `slope`: on the change a step, as a share of the baseline."""
    baseline: float | None = None
    """What is normal where it need not be learnt."""


DEGENERATION = (
    Signal("concentration", "answers/across_prompts", "the chance that two prompts get the same answer", 0.10),
    Signal("no_answer", "response/no_answer", "the share of responses without an answer", 0.15),
    Signal("truncation", "response/truncated", "the share of responses cut off", 0.15),
    Signal("repetition", "response/repetition", "the share of repeated n-grams", 0.20),
    Signal(
        "astray",
        "kl/start",
        "no more agreement than in the first steps, and the divergence from the start",
        0.10,
        baseline=0.0,
    ),
)
CHANGE = (
    Signal("length", "response/length", "the length of responses", math.log(1.6), "either", "log"),
    Signal("entropy", "policy/sampled_entropy", "the entropy a token", math.log(2), "down", "log"),
    Signal("entropy_slope", "policy/sampled_entropy", "the entropy a token", 0.03, "down", "slope"),
    Signal("majority", "vote/majority_ratio", "the share of the majority answer", 0.25, "either"),
    Signal("unique", "answers/unique", "the number of different answers to a prompt", math.log(2), "down", "log"),
    Signal("zero_variance", "reward/zero_variance", "the share of prompts that teach nothing", 0.25),
    Signal("divergence", "kl/start", "the divergence from the start", 0.10, baseline=0.0),
    Signal("flips", "vote/flip_rate", "the share of prompts whose majority changed", 0.25),
)
SIGNALS = (*DEGENERATION, *CHANGE)


@dataclass(frozen=True)
class Reading:
    """How far one signal is from what is normal."""

    signal: Signal
    value: float
    baseline: float
    excess: float
    """Change over its limit: 1 and more counts."""

    def __str__(self) -> str:
        if self.signal.scale == "slope":
            return f"{self.signal.words} falls by {-self.value:.0%} of its start a step"
        return f"{self.signal.words} is {self.value:.2f}, and was {self.baseline:.2f} in the first steps"


@dataclass(frozen=True)
class Verdict:
    """What the detector makes of a run after one step."""

    step: int
    state: State
    score: float
    """Largest excess of a sign of degeneration, with SUPPORT for each of change; 1 and more is suspect."""
    onset: int | None
    """Where the score began to rise towards the alarm; None before it."""
    alarm: int | None
    """Step of the alarm."""
    reasons: tuple[str, ...]
    """The signs that count now, the largest first."""

    @property
    def text(self) -> str:
        """The verdict in a sentence."""
        if self.alarm is None:
            return f"{self.state} at step {self.step}" + (f": {'; '.join(self.reasons)}" if self.reasons else "")
        return f"collapse since step {self.onset} (seen at step {self.alarm}): {'; '.join(self.reasons)}"


@dataclass
class _History:
    """What is kept of one signal."""

    first: list[float] = field(default_factory=list)
    """Its values in the first steps."""
    recent: list[float] = field(default_factory=list)


class CollapseDetector:
    """Feed it each step's metrics in order. It holds no clock and no randomness: the same rows give the same verdicts,
    while a run goes on, after a resume (`state_dict`) and over its metrics.jsonl."""

    def __init__(self, settings: CollapseSection) -> None:
        self.settings = settings
        self._histories: dict[str, _History] = {}
        self._streak: list[int] = []
        """Steps of the suspicious streak that lasts."""
        self._rise: list[int] = []
        """Steps of the rise, above ONSET_SHARE, that lasts."""
        self._onset: int | None = None
        self._alarm: int | None = None
        self._reasons: tuple[str, ...] = ()
        """Of the alarm."""

    def observe(self, step: int, metrics: Mapping[str, float | None]) -> Verdict:
        """The verdict after `step`. Metrics that are absent, null or NaN say nothing, and what they said last stays."""
        for signal in SIGNALS:
            value = metrics.get(signal.metric)
            if value is not None and math.isfinite(value):
                self._remember(signal, float(value))
        readings = [reading for signal in SIGNALS if (reading := self._read(signal)) is not None]
        majority = next((r for r in readings if r.signal.name == "majority"), None)
        if majority is None or majority.value > AGREEMENT_GREW * majority.baseline:
            readings = [r for r in readings if r.signal.name != "astray"]
        signs = sorted((r for r in readings if r.signal in DEGENERATION), key=lambda r: -r.excess)
        support = [r for r in readings if r.signal in CHANGE and r.excess >= 1]
        score = max(signs[0].excess, 0.0) * (1 + SUPPORT * len(support)) if signs else 0.0
        suspect = score >= 1
        self._streak = [*self._streak, step] if suspect else []
        self._rise = [*self._rise, step] if score >= ONSET_SHARE else []
        counted = [r for r in signs if r.excess >= 1] or signs[:1]
        reasons = tuple(map(str, [*counted, *support])) if suspect else ()
        if self._alarm is None and len(self._streak) >= self.settings.patience:
            self._onset = max(self._rise[0], self._streak[0] - ONSET_STEPS)
            self._alarm, self._reasons = step, reasons
        state: State = "learning" if not signs else "suspect" if suspect else "healthy"
        if self._alarm is not None:
            state, reasons = "collapsing", self._reasons
        return Verdict(step, state, score, self._onset, self._alarm, reasons)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {
            "first": {name: history.first for name, history in self._histories.items()},
            "recent": {name: history.recent for name, history in self._histories.items()},
            "streak": self._streak,
            "rise": self._rise,
            "onset": self._onset,
            "alarm": self._alarm,
            "reasons": list(self._reasons),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._histories = {
            name: _History(list(first), list(state["recent"][name])) for name, first in state["first"].items()
        }
        self._streak, self._rise = list(state["streak"]), list(state["rise"])
        self._onset, self._alarm, self._reasons = state["onset"], state["alarm"], tuple(state["reasons"])

    def _remember(self, signal: Signal, value: float) -> None:
        history = self._histories.setdefault(signal.name, _History())
        if signal.baseline is None and len(history.first) < self.settings.baseline_steps:
            history.first.append(value)
        kept = SLOPE_STEPS if signal.scale == "slope" else self.settings.window
        history.recent = [*history.recent, value][-kept:]

    def _read(self, signal: Signal) -> Reading | None:
        """None while the signal's first steps last, or where it was never logged."""
        history = self._histories.get(signal.name)
        if history is None or (signal.baseline is None and len(history.first) < self.settings.baseline_steps):
            return None
        normal = [signal.baseline] if signal.baseline is not None else history.first
        if signal.scale == "slope":
            value = _slope(history.recent) / max(abs(median(normal)), 1e-12)
            return Reading(signal, value, 0.0, -value / signal.limit)
        value, start = median(history.recent), median(normal)
        on_scale = [_scaled(signal, each) for each in normal]
        change = _scaled(signal, value) - median(on_scale)
        change = {"up": change, "down": -change, "either": abs(change)}[signal.direction]
        noise = MAD_TO_SIGMA * median(abs(each - median(on_scale)) for each in on_scale)
        return Reading(signal, value, start, change / max(signal.limit, self.settings.deviations * noise))


def _scaled(signal: Signal, value: float) -> float:
    return math.log(max(value, 1e-6)) if signal.scale == "log" else value


def _slope(values: Sequence[float]) -> float:
    """Least-squares slope of `values` a step; 0 for fewer than SLOPE_STEPS of them."""
    if len(values) < SLOPE_STEPS:
        return 0.0
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    top = sum((i - middle) * (value - mean) for i, value in enumerate(values))
    return top / sum((i - middle) ** 2 for i in range(len(values)))


def replay(rows: Sequence[Mapping[str, Any]], settings: CollapseSection) -> list[Verdict]:
    """The verdict after every row of a metrics.jsonl; rows without rollouts (step 0) say nothing and give none."""
    detector = CollapseDetector(settings)
    return [detector.observe(int(row["step"]), row) for row in rows if "response/length" in row]
