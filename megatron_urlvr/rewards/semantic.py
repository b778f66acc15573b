"""EMPO: rewards from the sizes of clusters of responses that mean the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from math import inf

import torch
from pydantic import Field, field_validator

from megatron_urlvr.config.base import Section
from megatron_urlvr.registry import Registry
from megatron_urlvr.types import Group

from .base import ANSWER, UNIT, MissingSignalError, Range, Reward, signal_of
from .registry import register
from .voting import shares_of

Clustering = Callable[[Group], Sequence[int | None]]
"""Clusters of a group's samples: equal numbers for equal meaning, None for a response that means nothing."""
CLUSTER = "cluster"
"""Signal: number of each sample's cluster, `[n]` float32, -1 for none; from a provider of your own."""

clusterings: Registry[Clustering] = Registry("clustering")


def by_answer(group: Group) -> Sequence[int | None]:
    """The grader's classes of equivalent answers."""
    if len(group.classes) != len(group.samples):
        raise MissingSignalError(
            f"the answers of prompt {group.prompt.id!r} have no classes; annotate the groups with the grader first"
        )
    return group.classes


def by_text(group: Group) -> Sequence[int | None]:
    """Whole responses, letter for letter but for spacing and case; an empty one means nothing."""
    first: dict[str, int] = {}
    texts = [" ".join(sample.text.casefold().split()) for sample in group.samples]
    return [first.setdefault(text, place) if text else None for place, text in enumerate(texts)]


clusterings.add("answer", by_answer)
clusterings.add("text", by_text)


class SemanticOptions(Section):
    equivalence: str = "answer"
    """What means the same: `answer`, the grader's classes; `text`, the same response; `signal`, the signal `cluster`
    of a provider; or a clustering from an entry point of the group `megatron_urlvr.clustering`."""
    max_entropy: float = Field(default=1.0, gt=0, le=1)
    """A group whose semantic entropy is not below this share of log n pays nobody."""
    min_share: float = Field(default=0.0, ge=0, le=1)
    """A group whose largest cluster has a smaller share pays nobody."""
    no_meaning: float = 0.0
    """Reward of a response in no cluster; the free-form variant of the source gives -0.5."""

    @field_validator("equivalence")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != "signal":
            clusterings.get(value)
        return value


@register
class SemanticEntropy(Reward[SemanticOptions]):
    """Share of the group that means the same, where the group is not all over the place. Metrics: `gated` (groups that
    pay nobody), `entropy` (semantic entropy over log n).

    A response in no cluster stands alone: it adds `log(n) / n` to the entropy and is paid `no_meaning`.
    """

    name = "semantic_entropy"
    needs = frozenset({ANSWER})
    Options = SemanticOptions
    formula = "|C(y)| / n if H(C) < max_entropy log n else 0, with H(C) = -sum_C share log share"
    value_range = Range(-inf, inf, "[0, 1] and no_meaning")
    source = "EMPO (arXiv 2504.05812); URLVR (arXiv 2603.08660) Table 2"

    def __init__(self, options: SemanticOptions | None = None, *, seed: int = 0) -> None:
        super().__init__(options, seed=seed)
        if self.options.equivalence != "answer":
            self.needs = frozenset({CLUSTER} if self.options.equivalence == "signal" else set())
        self.value_range = UNIT.including(self.options.no_meaning)

    def score(self, group: Group) -> torch.Tensor:
        clusters = self._clusters(group)
        shares = shares_of(clusters)
        paid = not self._gated(clusters)
        return torch.tensor(
            [self.options.no_meaning if c is None else shares[c] * paid for c in clusters], dtype=torch.float64
        )

    def counts(self, groups: Sequence[Group], scores: Sequence[torch.Tensor]) -> Sequence[Mapping[str, float]]:
        found = [self._clusters(group) for group in groups]
        return [
            {"gated": float(self._gated(each)), "entropy": semantic_entropy(each) / math.log(max(len(each), 2))}
            for each in found
        ]

    def _clusters(self, group: Group) -> Sequence[int | None]:
        if self.options.equivalence == "signal":
            numbers = signal_of(self, group, CLUSTER).tolist()
            return [None if number < 0 else int(number) for number in numbers]
        return clusterings.get(self.options.equivalence)(group)

    def _gated(self, clusters: Sequence[int | None]) -> bool:
        largest = max(shares_of(clusters).values(), default=0.0)
        # In units of log n, with room for rounding: n different answers must be gated at max_entropy = 1.
        limit = self.options.max_entropy * math.log(len(clusters)) - 1e-12
        return largest < self.options.min_share or semantic_entropy(clusters) >= limit


def semantic_entropy(clusters: Sequence[int | None]) -> float:
    """Entropy of the clusters' shares, nats; every response in no cluster is one of its own."""
    shares = [*shares_of(clusters).values(), *(1 / len(clusters) for c in clusters if c is None)]
    return -math.fsum(share * math.log(share) for share in shares)
