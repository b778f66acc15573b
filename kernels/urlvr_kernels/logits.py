"""Statistics from materialised logits, vocabulary-parallel or whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .call import Ops, cut, wide_dtype
from .rowstate import COUNT, FIELDS, Wanted, empty_state, merge, slopes, statistics
from .stats import DIFFERENTIABLE
from .tiling import tile_logits
from .tp import TensorParallel


@dataclass(frozen=True)
class LogitsCall:
    """One call's arguments, checked and resolved."""

    ops: Ops
    outputs: tuple[str, ...]
    target: torch.Tensor | None
    inv_tau: torch.Tensor | float | None
    ignored: torch.Tensor | None
    """`[T]` bool: rows whose gradient is zero whatever they hold."""
    first: int
    valid: int
    vocab_size: int | None
    tp: TensorParallel
    inplace_grad: bool


def logits_statistics(logits: torch.Tensor, call: LogitsCall) -> dict[str, torch.Tensor]:
    """Statistics by name, `[T]` each."""
    if torch.is_grad_enabled() and logits.requires_grad:
        return dict(zip(call.outputs, _LogitsStats.apply(logits, call), strict=True))
    state = _forward(logits, call)
    return statistics(state, call.outputs, _vocabulary(call, state))[2]


class _LogitsStats(torch.autograd.Function):
    """Reads the logits once forward, once backward; saves two numbers a row beside them."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, call: LogitsCall) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        state = _forward(logits, call)
        ctx.vocab = _vocabulary(call, state)
        lse, entropy, found = statistics(state, call.outputs, ctx.vocab)
        ctx.mark_non_differentiable(*(value for name, value in found.items() if name not in DIFFERENTIABLE))
        ctx.save_for_backward(logits, lse, entropy)
        ctx.call = call
        return tuple(found[name] for name in call.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        logits, lse, entropy = ctx.saved_tensors
        call: LogitsCall = ctx.call
        given = {k: g for k, g in zip(call.outputs, grads, strict=True) if g is not None and k in DIFFERENTIABLE}
        if not given:
            return None, None
        gradient = slopes(lse, entropy, given, ctx.vocab)
        if call.inplace_grad:
            out = logits.detach()
            torch.autograd.graph.increment_version(logits)  # a second backward through these logits must not succeed
        else:
            out = torch.empty_like(logits)
        out[:, call.valid :].zero_()
        tiling = tile_logits(*logits.shape, itemsize=lse.dtype.itemsize, device=logits.device)
        for tile in tiling.tiles(slice(0, logits.shape[0])):
            for columns in tiling.chunks(call.valid):
                call.ops.dlogits(
                    logits.detach()[tile, columns],
                    out[tile, columns],
                    gradient.rows(tile),
                    target=None if call.target is None else call.target[tile],
                    first=call.first + columns.start,
                    inv_tau=cut(call.inv_tau, tile),
                    masked=True,
                )
        if call.ignored is not None:
            out.masked_fill_(call.ignored.unsqueeze(1), 0.0)
        return out, None


def _forward(logits: torch.Tensor, call: LogitsCall) -> torch.Tensor:
    """State of the whole vocabulary, `[8, T]`."""
    rows = logits.shape[0]
    wide = wide_dtype(logits.dtype)
    logits = logits.detach()
    tiling = tile_logits(*logits.shape, itemsize=wide.itemsize, device=logits.device)
    chunks = tiling.chunks(call.valid)
    if not chunks:
        return call.tp.merge_states(empty_state(0, rows, like=logits, dtype=wide), Wanted.of(call.outputs))
    parts = logits.new_empty(len(chunks), FIELDS, rows, dtype=wide)
    for part, columns in zip(parts, chunks, strict=True):
        part[COUNT] = columns.stop - columns.start
        for tile in tiling.tiles(slice(0, rows)):
            call.ops.row_state(
                logits[tile, columns],
                part[:, tile],
                Wanted.of(call.outputs),
                target=None if call.target is None else call.target[tile],
                first=call.first + columns.start,
                inv_tau=cut(call.inv_tau, tile),
                masked=True,
            )
    return call.tp.merge_states(merge(parts, Wanted.of(call.outputs)), Wanted.of(call.outputs))


def _vocabulary(call: LogitsCall, state: torch.Tensor) -> int | torch.Tensor:
    if call.vocab_size is not None:
        return call.vocab_size
    return call.valid if call.tp.group is None else state[COUNT]
