"""The vote: which answer a group agrees on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_urlvr.types import Group


@dataclass(frozen=True)
class Vote:
    """Outcome of a majority vote over equivalence classes of answers."""

    winner: int | None
    """The class with most members; None when no answer could be parsed."""
    count: int
    """Members of the winning class."""
    ratio: float
    """`count` over the number of samples, unparsable ones included."""
    tied: tuple[int, ...]
    """All classes with `count` members, the winner first; empty when there is no winner."""


def vote(classes: Sequence[int | None], indices: Sequence[int] | None = None) -> Vote:
    """Majority vote. None (nothing parsed) counts in the ratio's denominator and never votes.

    Of classes with equally many members, the one whose first member has the lowest sample index wins. `indices` holds
    the samples' indices where `classes` is not in their order.
    """
    members: dict[int, int] = {}
    if indices is not None and list(indices) != sorted(indices):
        classes = [cls for _, cls in sorted(zip(indices, classes, strict=True), key=lambda pair: pair[0])]
    for cls in classes:
        if cls is not None:
            members[cls] = members.get(cls, 0) + 1
    if not members:
        return Vote(winner=None, count=0, ratio=0.0, tied=())
    count = max(members.values())
    tied = tuple(cls for cls, number in members.items() if number == count)  # a dict keeps the order of first members
    return Vote(winner=tied[0], count=count, ratio=count / len(classes), tied=tied)


def vote_of(group: Group) -> Vote:
    """The vote of `group`, whatever order its samples stand in."""
    return vote(group.classes, [sample.index for sample in group.samples])


def shares_of(classes: Sequence[int | None]) -> dict[int, float]:
    """Share of the samples in each class, unparsable ones in the denominator; classes in order of their first
    member."""
    counts: dict[int, int] = {}
    for cls in classes:
        if cls is not None:
            counts[cls] = counts.get(cls, 0) + 1
    return {cls: count / len(classes) for cls, count in counts.items()}
