"""Signs of a collapse that need no labels and no ratio of sums can say: answers across prompts, repetition, flips.

groups ─► GroupAnswers (of every replica, gathered) ─► across_prompts, flip_rate
groups ─► repetition_sums (merge with the sums of `monitor.audit`)
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from megatron_urlvr.rewards.voting import vote_of
from megatron_urlvr.types import Group

from .audit import Sums

NGRAM = 4
"""Tokens of the n-grams whose repetition is counted."""
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 1], dtype=np.uint64)
"""Odd multipliers of an n-gram's places, modulo 2^64: two n-grams meet by chance once in some 10^19 pairs."""


class GroupAnswers(TypedDict):
    """What a group answered, as ranks exchange it."""

    prompt: str
    counts: dict[str, int]
    """Samples by answer; unparsable ones are left out. Equivalent answers count under their first member's text."""
    winner: str | None


def group_answers(groups: Sequence[Group]) -> list[GroupAnswers]:
    """The answers of graded groups. They are shortened to digests: answers may be long, and only equality counts."""
    out: list[GroupAnswers] = []
    for group in groups:
        counts = Counter(_text(group, cls) for cls in group.classes if cls is not None)
        winner = vote_of(group).winner
        out.append(
            {
                "prompt": group.prompt.id,
                "counts": dict(counts),
                "winner": None if winner is None else _text(group, winner),
            }
        )
    return out


def _text(group: Group, cls: int) -> str:
    return hashlib.blake2b(str(group.samples[cls].answer).encode(), digest_size=8).hexdigest()


def across_prompts(answers: Iterable[GroupAnswers]) -> float | None:
    """Chance that two parsed answers to different prompts are the same one: `sum_a (T_a^2 - sum_p c_pa^2)` over
    `N^2 - sum_p N_p^2`, with `c_pa` answers a to prompt p. None with parsed answers to fewer than two prompts.

    A policy that says one thing whatever it is asked has 1; true answers of ten equally likely values have 0.1.
    """
    prompts: dict[str, Counter[str]] = {}
    for group in answers:
        prompts.setdefault(group["prompt"], Counter()).update(group["counts"])
    total: Counter[str] = Counter()
    within = pairs_within = 0
    for counts in prompts.values():
        total.update(counts)
        within += sum(count**2 for count in counts.values())
        pairs_within += sum(counts.values()) ** 2
    pairs = sum(total.values()) ** 2 - pairs_within
    return (sum(count**2 for count in total.values()) - within) / pairs if pairs else None


class MajorityMemory:
    """The majority answer of every prompt when it was last met; its `state` goes into checkpoints."""

    def __init__(self, state: Mapping[str, str] | None = None) -> None:
        self.state: dict[str, str] = dict(state or {})

    def flip_rate(self, answers: Iterable[GroupAnswers]) -> float | None:
        """Share of the prompts met before whose majority answer is another one now, and remember what it is. None
        where no prompt was met before. Groups without an answer are passed over."""
        met = flipped = 0
        for group in answers:
            if group["winner"] is None:
                continue
            before = self.state.get(group["prompt"])
            met += before is not None
            flipped += before is not None and before != group["winner"]
            self.state[group["prompt"]] = group["winner"]
        return flipped / met if met else None


def repetition_sums(groups: Sequence[Group]) -> Sums:
    """Sums of `response/repetition`: of the n-grams of NGRAM tokens, those that stood in the same response before."""
    repeated = total = 0
    for group in groups:
        for sample in group.samples:
            grams = max(len(sample.tokens) - NGRAM + 1, 0)
            total += grams
            repeated += grams - _distinct(np.asarray(sample.tokens, dtype=np.uint64))
    return {"response/repetition": (float(repeated), float(total))}


def _distinct(tokens: NDArray[np.uint64]) -> int:
    """Different n-grams of a response `[T]`."""
    if len(tokens) < NGRAM:
        return 0
    windows = np.lib.stride_tricks.sliding_window_view(tokens, NGRAM)
    return len(np.unique((windows * _MIX).sum(axis=1, dtype=np.uint64)))  # one number each: far faster than rows
