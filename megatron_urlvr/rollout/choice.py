"""Which of a prompt's votes are trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

How = Literal["first", "random", "stratified"]


def choose(classes: Sequence[int | None], count: int, how: How, seed: int) -> list[int]:
    """`count` places of `range(len(classes))`, in order.

    `classes`: the class of each vote's answer, None where nothing was parsed. `first`: the lowest places.
    `random`: any, all alike. `stratified`: of every answer its share of the votes, rounded by largest remainders
    (what cannot be parsed counts as one more answer), and any of its votes alike. ValueError for more than there are.
    """
    if count > len(classes):
        raise ValueError(f"{count} of {len(classes)} votes are to be trained on")
    if how == "first" or count == len(classes):
        return list(range(count))
    draw = random.Random(seed)
    if how == "random":
        return sorted(draw.sample(range(len(classes)), count))
    strata: dict[int | None, list[int]] = {}
    for place, answer in enumerate(classes):
        strata.setdefault(answer, []).append(place)
    exact = {answer: count * len(places) / len(classes) for answer, places in strata.items()}
    share = {answer: int(value) for answer, value in exact.items()}
    left = sorted(strata, key=lambda answer: (share[answer] - exact[answer], strata[answer][0]))
    for answer in left[: count - sum(share.values())]:
        share[answer] += 1
    return sorted(place for answer, places in strata.items() for place in draw.sample(places, share[answer]))
