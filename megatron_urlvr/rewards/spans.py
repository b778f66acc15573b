"""Which tokens of a response are its answer: the part of it that a reward looks at."""

from __future__ import annotations

from typing import Any, Literal

import torch

from megatron_urlvr.types import Group

from .base import MissingSignalError, Reward, signal_of

Span = Literal["all", "reasoning", "answer", "not_answer"]
ANSWER_START = "answer_start"
"""Signal: index of the answer's first token, `[n]` float32; -1 without an answer."""
ANSWER_END = "answer_end"
"""Signal: index after the answer's last token, `[n]` float32; -1 without an answer."""
SPAN_SIGNALS = frozenset({ANSWER_START, ANSWER_END})


def token_mask(reward: Reward[Any], group: Group, place: int, span: Span) -> torch.Tensor:
    """The tokens of the sample at `place` that lie in `span`, `[T]` bool.

    MissingSignalError where the answers were not located, or lie outside the response.
    """
    sample = group.samples[place]
    inside = torch.zeros(sample.length, dtype=torch.bool)
    if span == "all":
        return ~inside
    first = int(signal_of(reward, group, ANSWER_START)[place])
    last = int(signal_of(reward, group, ANSWER_END)[place])
    if first < 0:
        return inside if span == "answer" else ~inside
    if not first < last <= sample.length:
        raise MissingSignalError(
            f"reward {reward.name!r}: the answer of sample {sample.index} of prompt {sample.prompt_id!r} is said to be "
            f"tokens {first} to {last} of {sample.length}; locate the answers again"
        )
    if span == "reasoning":
        inside[:first] = True
        return inside
    inside[first:last] = True
    return inside if span == "answer" else ~inside
