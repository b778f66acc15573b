"""From the arguments of the public functions to what the passes run on, checked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from . import checks
from .call import Rows, Shard
from .device import wide_dtype
from .tp import TensorParallel


def resolve_head(
    weight: torch.Tensor,
    hidden: torch.Tensor,
    vocab_start: int,
    vocab_size: int | None,
    group: dist.ProcessGroup | None,
    wgrad: str,
) -> tuple[torch.Tensor, Shard]:
    """The weight, and the part of the vocabulary that it stands for; no rows of one that was refused in a group."""
    tp = TensorParallel.of(group)
    checks.check_vocab_size(vocab_size)
    try:
        checks.check_weight(weight, hidden, wgrad)
    except ValueError as error:
        return hidden.detach()[:0], _refuse(error, vocab_size, tp)
    return weight, resolve_shard("weight", weight.shape[0], vocab_start, vocab_size, group)


def resolve_shard(
    holder: str, columns: int, vocab_start: int, vocab_size: int | None, group: dist.ProcessGroup | None
) -> Shard:
    """The part of the vocabulary that `holder` ("weight" or "logits"), `columns` wide with padding, stands for."""
    tp = TensorParallel.of(group)
    checks.check_vocab_size(vocab_size)
    try:
        valid = checks.check_shard(holder, columns, vocab_start, vocab_size, tp.size > 1)
    except ValueError as error:
        return _refuse(error, vocab_size, tp)
    return Shard(vocab_start, valid, vocab_size, tp)


def _refuse(error: ValueError, vocab_size: int | None, tp: TensorParallel) -> Shard:
    """Raises what is wrong with this rank's shard; in a group not before the others know."""
    if tp.group is None:
        raise error
    return Shard(0, 0, vocab_size, tp, refusal=str(error))


def resolve_rows(
    like_name: str,
    like: torch.Tensor,
    shard: Shard,
    total: int,
    target: torch.Tensor | None,
    temperature: float | torch.Tensor,
    index: torch.Tensor | None = None,
    upstream: Mapping[str, torch.Tensor] | None = None,
) -> Rows:
    """What belongs to the rows that are read of `total`: all of them, or those in `index`."""
    if index is not None:
        checks.check_row_index(index, total, like)
    asked = total if index is None else index.shape[0]
    ignored = None if target is None else checks.check_target(target, asked, shard.known_size, like_name, like)
    inv_tau = checks.resolve_temperature(temperature, asked, wide_dtype(like.dtype), like_name, like)
    if upstream is not None:
        checks.check_upstream(upstream, asked, like_name, like)
    return Rows(target, inv_tau, index, None if upstream is None else dict(upstream), ignored, asked)
