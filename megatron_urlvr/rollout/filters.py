"""Dynamic sampling: which of a step's over-sampled groups are trained on, and why the others are not.

A filter looks at one group and its rewards and says `Verdict(keep, reason)`; reasons become metrics by themselves.
Third parties add one through the entry point group `megatron_urlvr.filter`: a subclass of `Filter`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, cast

import torch
from pydantic import Field

from ..algorithms.advantages import zero_variance
from ..config.base import Section, rule
from ..registry import Registry
from ..rewards.base import NoOptions
from ..rewards.voting import vote_of
from ..types import Group


class Verdict(NamedTuple):
    """What a filter says of a group."""

    keep: bool
    reason: str
    """One or two words, `[a-z_]+`: the last part of a metric's name."""


OptionsT = TypeVar("OptionsT", bound=Section)


class Filter(ABC, Generic[OptionsT]):
    """Decides on one group at a time, from what needs no label: the same answer on every layout."""

    name: ClassVar[str]
    Options: ClassVar[type[Section]] = NoOptions

    def __init__(self, options: OptionsT | None = None) -> None:
        """`options` may be left out when all of them have defaults."""
        self.options = options if options is not None else cast(OptionsT, type(self).Options())

    @abstractmethod
    def judge(self, group: Group, rewards: torch.Tensor) -> Verdict:
        """`rewards`: the proxy of the group's samples, `[n]` float64."""


_filters: Registry[type[Filter[Any]]] = Registry("filter")


def get_filter(name: str) -> type[Filter[Any]]:
    """The filter class called `name`. UnknownName if there is none."""
    found = _filters.get(name)
    if not (isinstance(found, type) and issubclass(found, Filter)):
        raise TypeError(f"filter {name!r} is {found!r}, which is no subclass of megatron_urlvr.rollout.filters.Filter")
    return found


def available() -> list[str]:
    """Names of all filters, those of installed entry points included."""
    return _filters.names()


class ZeroVariance(Filter[NoOptions]):
    """Drops groups whose samples all have the same reward: their gradient is zero (DAPO, arXiv 2503.14476, section
    3.2, there for accuracy)."""

    name = "zero_variance"

    def judge(self, group: Group, rewards: torch.Tensor) -> Verdict:
        """See Filter."""
        if bool(zero_variance(rewards[None])[0]):
            return Verdict(False, "zero_variance")
        return Verdict(True, "varied")


class Band(Section):
    """Options of `majority`."""

    low: float = Field(default=0.0, ge=0, le=1)
    """Lowest share of the winning answer."""
    high: float = Field(default=1.0, ge=0, le=1)
    """Highest share of the winning answer."""

    @rule("low", "high")
    def _ordered(self) -> str | None:
        return f"low = {self.low} is above high = {self.high}: no group lies between" if self.low > self.high else None


class Majority(Filter[Band]):
    """Keeps groups whose majority is neither too small to be trusted nor so large that nothing is left to learn: the
    share of the winning answer, unparsable ones in the denominator, within [low, high]."""

    name = "majority"
    Options = Band

    def judge(self, group: Group, rewards: torch.Tensor) -> Verdict:
        """See Filter."""
        outcome = vote_of(group)
        if outcome.winner is None:
            return Verdict(False, "no_answer")
        if outcome.ratio < self.options.low:
            return Verdict(False, "minority")
        if outcome.ratio > self.options.high:
            return Verdict(False, "unanimous")
        return Verdict(True, "in_band")


for _own in (ZeroVariance, Majority):
    _filters.add(_own.name, _own)


class Selection(NamedTuple):
    """The groups that are trained on."""

    kept: list[int]
    """Their places, in order: `quota` of them."""
    counts: dict[str, float]
    """Groups by what became of them: `kept`, `spare` (good, but more than wanted), `filled` (dropped ones that stand
    in for good ones that were wanted), and `dropped/<reason>`."""


def select(filter_: Filter[Any], groups: Sequence[Group], rewards: Sequence[torch.Tensor], quota: int) -> Selection:
    """The first `quota` groups that the filter keeps; where they are too few, the first dropped ones fill up, so that
    every step has the same shape."""
    verdicts = [filter_.judge(group, reward) for group, reward in zip(groups, rewards, strict=True)]
    good = [place for place, verdict in enumerate(verdicts) if verdict.keep]
    bad = [place for place, verdict in enumerate(verdicts) if not verdict.keep]
    filled = bad[: max(0, quota - len(good))]
    counts = Counter(f"dropped/{verdicts[place].reason}" for place in bad)
    counts |= Counter(kept=len(good[:quota]), spare=len(good[quota:]), filled=len(filled))
    found = {"kept": 0, "spare": 0, "filled": 0} | dict(counts)
    return Selection(sorted(good[:quota] + filled), {name: float(count) for name, count in found.items()})
