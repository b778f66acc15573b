"""What a reward is: the interface that third parties implement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

import torch

from megatron_urlvr.config.base import Section
from megatron_urlvr.types import Group

ANSWER = "answer"
"""Signal: `sample.answer` and `group.classes`, from the grader."""
LABEL = "label"
"""Signal: `group.signals["correct"]`, 1 where the answer is right. Only supervised rewards may need it."""

PERMUTED_LABEL = "permuted_label"
"""Signal: 1 where the answer is right for another prompt's label. Only supervised rewards may need it."""


class RewardError(RuntimeError):
    """A reward cannot be computed; the message says which, for which prompt and sample, and why."""


class MissingSignalError(RewardError):
    """A signal that a reward needs was not computed. Never replaced by a default."""


class NonFiniteScoreError(RewardError):
    """A reward is NaN or infinite."""


class NoOptions(Section):
    """A reward without options of its own."""


OptionsT = TypeVar("OptionsT", bound=Section)


@dataclass(frozen=True)
class Range:
    """The numbers that a reward may be: all of them lie in `low`..`high`."""

    low: float
    high: float
    text: str = ""
    """How it is written, where the interval says too little."""

    def including(self, value: float) -> Range:
        """The range of a reward that may be `value` too."""
        return self if self.low <= value <= self.high else Range(min(self.low, value), max(self.high, value))

    @property
    def is_unit(self) -> bool:
        """Whether the reward can be read as a probability."""
        return self.low >= 0 and self.high <= 1

    def __str__(self) -> str:
        left = "(" if self.low == -inf else "["
        right = ")" if self.high == inf else "]"
        return self.text or f"{left}{self.low:g}, {self.high:g}{right}"


UNIT = Range(0, 1)
BINARY = Range(0, 1, "{0, 1}")


class Reward(ABC, Generic[OptionsT]):
    """One scalar for each sample of a group. Subclass it, set the class attributes, implement `score`, and register
    the class (`rewards.registry.register`, or the entry point group `megatron_urlvr.reward`).

    A reward is pure and instant: what takes work (judges, executors) is a `Provider`'s, fetched before.
    """

    name: ClassVar[str]
    needs: frozenset[str]
    """Signals that `score` reads: token statistics (`types.STATISTICS`), `answer`, `label`, or a provider's. A class
    attribute; an instance may need more, by its options."""
    supervised: ClassVar[bool] = False
    """True when it reads labels; the whole run is then marked supervised."""
    formula: ClassVar[str]
    value_range: Range
    """A class attribute; an instance may have another, by its options."""
    source: ClassVar[str]
    """Where the formula is from."""
    Options: ClassVar[type[Section]] = NoOptions

    def __init__(self, options: OptionsT | None = None, *, seed: int = 0) -> None:
        """`options` may be left out when all of them have defaults. `seed` is the run's."""
        self.options = options if options is not None else cast(OptionsT, type(self).Options())
        self.seed = seed

    @abstractmethod
    def score(self, group: Group) -> torch.Tensor:
        """Scores of the samples of `group`, `[n]` float32 or float64 on the CPU, never NaN.

        MissingSignalError when a signal is absent.
        """

    def score_groups(self, groups: Sequence[Group]) -> list[torch.Tensor]:
        """`score` of each group; for rewards that are faster on many at once."""
        return [self.score(group) for group in groups]

    def logs(self, groups: Sequence[Group]) -> list[torch.Tensor] | None:
        """Natural logs of the scores of each group, `[n]` float64, from rewards whose scores may be too small for a
        float64: advantages that depend on nothing but a group's ratios are made of them. None from all others."""
        return None

    def counts(self, groups: Sequence[Group], scores: Sequence[torch.Tensor]) -> Sequence[Mapping[str, float]]:
        """What is worth a metric in the scoring of each group, by name: shares of the group or its means. `scores` are
        what `score_groups` returned."""
        return [{} for _ in groups]


def statistics(reward: Reward[Any], groups: Sequence[Group], name: str) -> tuple[torch.Tensor, list[int]]:
    """The statistic `name` of all samples of `groups` laid end to end, `[sum T]` float64 on the CPU, and the number of
    tokens of each sample.

    MissingSignalError where a sample lacks it, has it for another number of tokens than it has, or has no token at all
    (then neither a mean nor a sum says anything about the policy).
    """
    pieces: list[torch.Tensor] = []
    lengths: list[int] = []
    for group in groups:
        for sample in group.samples:
            value = getattr(sample.stats, name, None)
            if value is None:
                raise MissingSignalError(
                    f"reward {reward.name!r} needs the token statistic {name!r}, which was not computed for sample "
                    f"{sample.index} of prompt {sample.prompt_id!r}; let the scoring pass compute it"
                )
            tokens = len(sample.tokens)
            if value.shape != (tokens,) or tokens == 0:
                raise MissingSignalError(
                    f"reward {reward.name!r}: sample {sample.index} of prompt {sample.prompt_id!r} has {tokens} tokens "
                    f"and {name!r} for {value.numel()}; every response needs at least one token and a value for each"
                )
            pieces.append(value)
            lengths.append(tokens)
    if not pieces:
        return torch.zeros(0, dtype=torch.float64), []
    return torch.cat(pieces).detach().to("cpu", torch.float64), lengths


class Asking(Protocol):
    """A reward, or a provider."""

    @property
    def name(self) -> str: ...


def classes_of(asking: Asking, group: Group) -> list[int | None]:
    """Equivalence classes of the answers of `group`. MissingSignalError if the answers were not graded."""
    if len(group.classes) != len(group.samples):
        raise MissingSignalError(
            f"reward {asking.name!r} needs the answers of prompt {group.prompt.id!r}, but {len(group.classes)} of its "
            f"{len(group.samples)} samples have a class; annotate the groups with the grader before scoring"
        )
    return group.classes


def signal_of(asking: Asking, group: Group, key: str) -> torch.Tensor:
    """`group.signals[key]`, `[n]` float32. MissingSignalError if it is absent, has another length or holds a NaN."""
    value = group.signals.get(key)
    if value is None or value.shape != (len(group.samples),) or bool(value.isnan().any()):
        shape = "absent" if value is None else f"{value.tolist()}"
        raise MissingSignalError(
            f"reward {asking.name!r} needs the signal {key!r} of prompt {group.prompt.id!r}, one number for each of "
            f"its {len(group.samples)} samples, but it is {shape}"
        )
    return value
