"""Statistics from materialised logits, vocabulary-parallel or whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .call import Ops, Rows, Shard, cut
from .device import wide_dtype
from .rowstate import COUNT, FIELDS, Wanted, empty_state, incoming, statistics
from .stats import DIFFERENTIABLE
from .tiling import Tiling, tile_logits


@dataclass(frozen=True)
class LogitsCall:
    """One call's arguments, checked and resolved."""

    ops: Ops
    outputs: tuple[str, ...]
    shard: Shard
    rows: Rows
    inplace_grad: bool


def logits_statistics(logits: torch.Tensor, call: LogitsCall) -> dict[str, torch.Tensor]:
    """Statistics by name, `[T]` each."""
    if torch.is_grad_enabled() and logits.requires_grad:
        return dict(zip(call.outputs, _LogitsStats.apply(logits, call), strict=True))
    state = _forward(logits, call)
    return statistics(state, call.outputs, call.shard.size(state))[2]


class _LogitsStats(torch.autograd.Function):
    """Reads the logits once forward, once backward; saves two numbers a row beside them."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, call: LogitsCall) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        state = _forward(logits, call)
        ctx.vocab = call.shard.size(state)
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
        gradient = incoming(given, ctx.vocab, lse.dtype).slopes(lse, entropy)
        if call.inplace_grad:
            out = logits.detach()
            torch.autograd.graph.increment_version(logits)  # a second backward through these logits must not succeed
        else:
            out = torch.empty_like(logits)
        out[:, call.shard.valid :].zero_()
        tiling = _tiling(logits, call)
        for tile in tiling.tiles(slice(0, logits.shape[0])):
            for columns in tiling.chunks(call.shard.valid):
                call.ops.dlogits(
                    logits.detach()[tile, columns],
                    out[tile, columns],
                    gradient.rows(tile),
                    target=None if call.rows.target is None else call.rows.target[tile],
                    first=call.shard.first + columns.start,
                    inv_tau=cut(call.rows.inv_tau, tile),
                    masked=True,
                )
        if call.rows.ignored is not None:
            out.masked_fill_(call.rows.ignored.unsqueeze(1), 0.0)
        return out, None


def _tiling(logits: torch.Tensor, call: LogitsCall) -> Tiling:
    if call.ops.fused:
        return Tiling(max(logits.shape[0], 1), max(logits.shape[0], 1), max(call.shard.valid, 1))
    return tile_logits(*logits.shape, itemsize=wide_dtype(logits.dtype).itemsize, device=logits.device)


def _forward(logits: torch.Tensor, call: LogitsCall) -> torch.Tensor:
    """State of the whole vocabulary, `[8, T]`."""
    rows, wide, wanted = logits.shape[0], wide_dtype(logits.dtype), Wanted.of(call.outputs)
    logits = logits.detach()
    tiling = _tiling(logits, call)
    chunks = tiling.chunks(call.shard.valid)
    if chunks:
        parts = logits.new_empty(len(chunks), FIELDS, rows, dtype=wide)
    else:  # a shard of padding alone
        parts = empty_state(0, rows, like=logits, dtype=wide).unsqueeze(0)
    for part, columns in zip(parts, chunks, strict=False):
        part[COUNT].fill_(columns.stop - columns.start)
        for tile in tiling.tiles(slice(0, rows)):
            call.ops.row_state(
                logits[tile, columns],
                part[:, tile],
                wanted,
                target=None if call.rows.target is None else call.rows.target[tile],
                first=call.shard.first + columns.start,
                inv_tau=cut(call.rows.inv_tau, tile),
                masked=True,
            )
    return call.shard.join(call.ops.merge(parts, wanted), call.rows.target, call.ops, wanted)
