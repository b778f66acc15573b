"""Rewards over evaluated samples, whatever the run trains on: which can be computed, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_urlvr.config.errors import did_you_mean
from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.loop.assembly import Parts
from megatron_urlvr.policy.batch import Row
from megatron_urlvr.rewards.base import ANSWER, Reward
from megatron_urlvr.rewards.registry import available, get_reward
from megatron_urlvr.types import STATISTICS, Group

AGGREGATION = "aggregation"
UNIT_RANGES = ("[0, 1]", "{0, 1}")
"""Value ranges of rewards that can be read as probabilities."""


class Scorer:
    """Scores groups by several rewards; `labels` names them, `calibrated` those in 0..1."""

    def __init__(self, parts: Parts, names: Sequence[str], *, seed: int, temperature: float | None) -> None:
        self.parts, self.temperature = parts, temperature
        self.rewards: dict[str, Reward[Any]] = {}
        for name in names:
            self.rewards |= _instances(name, seed)
        self.calibrated = {label for label, reward in self.rewards.items() if reward.value_range in UNIT_RANGES}

    def __call__(self, groups: Sequence[Group]) -> list[dict[str, list[float]]]:
        """Scores of each group by label, `[n]`. One forward for all rewards. Collective within a replica."""
        wanted = frozenset().union(*(reward.needs for reward in self.rewards.values())) & STATISTICS
        if wanted:
            samples = [(group, sample) for group in groups for sample in group.samples]
            rows = [Row(group.prompt.tokens, sample.tokens) for group, sample in samples]
            for (_, sample), stats in zip(
                samples, self.parts.policy.score(rows, wanted, temperature=self.temperature), strict=True
            ):
                sample.stats = stats
        by_label = {label: reward.score_groups(groups) for label, reward in self.rewards.items()}
        return [{label: scores[i].tolist() for label, scores in by_label.items()} for i in range(len(groups))]


def scorable(names: Sequence[str]) -> list[str]:
    """`names`, or for `all` every label-free reward that needs nothing but samples and their statistics. UnusableInput
    for one that does not exist, reads labels or needs another signal."""
    if list(names) == ["all"]:
        return [name for name in available() if not _obstacle(name)]
    for name in names:
        if name not in available():
            raise UnusableInput(f"--reward {name}: there is no such reward.{did_you_mean(name, available())}")
        if problem := _obstacle(name):
            raise UnusableInput(f"--reward {name}: {problem}.")
    return list(dict.fromkeys(names))


def _obstacle(name: str) -> str:
    """Why a reward cannot be computed here; empty when it can."""
    cls = get_reward(name)
    if cls.supervised:
        return "it reads labels, so that its agreement with them says nothing"
    if others := cls.needs - STATISTICS - {ANSWER}:
        return f"it needs the signal {sorted(others)[0]!r}, which evaluation does not compute"
    if must := [k for k, field in cls.Options.model_fields.items() if field.is_required() and k != AGGREGATION]:
        return f"its option {must[0]!r} must be given, and evaluation takes defaults"
    return ""


def _instances(name: str, seed: int) -> dict[str, Reward[Any]]:
    """The reward with its defaults; with both ways to aggregate where one must be chosen."""
    cls = get_reward(name)
    field = cls.Options.model_fields.get(AGGREGATION)
    if field is None or not field.is_required():
        return {name: cls(cls.Options(), seed=seed)}
    return {f"{name}_{way}": cls(cls.Options(**{AGGREGATION: way}), seed=seed) for way in ("mean", "sum")}
