"""Statistics and gradients of the head in one pass, for gradients that are known beforehand.

Blocks of whole rows: logits, their state, dlogits, dH and dW. Under tensor parallelism, and on GPUs, the state of a
block is complete before its first dlogits; on a CPU that holds whole rows both are made band by band, in the cache.
"""

from __future__ import annotations

import torch

from .call import HeadCall, cut, logit_scale, read_rows
from .device import on_cpu, wide_dtype
from .gemm import logits_of
from .passes import (
    Sums,
    Workspace,
    dlogits_of_tile,
    inside,
    is_whole,
    room_for_dlogits,
    room_for_states,
    state_of_tile,
    vocabulary,
)
from .rowstate import Slopes, empty_state, slopes, statistics
from .tiling import Tiling, row_pitch, tile_one_pass
from .torch_ops import TorchOps


def one_pass(
    hidden: torch.Tensor, weight: torch.Tensor, call: HeadCall, need: tuple[bool, bool]
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
    """Statistics, and gradients of `sum upstream[k] * k`, in one pass over blocks of whole rows of logits."""
    assert call.upstream is not None
    count = _row_count(hidden, call)
    tiling = _one_pass_tiling(count, call, hidden)
    sums = Sums(hidden, weight, call, count, tiling, need)
    rows = read_rows(hidden, call, sums.room)
    work = Workspace(tiling.block_rows, call.valid, rows, call.logits_dtype)
    slope_room = room_for_dlogits(work, rows, call)
    scale = logit_scale(hidden, call)
    chunks = tiling.chunks(call.valid)
    joined = _joined_ops(call, rows, chunks)
    found: list[dict[str, torch.Tensor]] = []
    for block in tiling.blocks(count):
        parts = room_for_states(chunks, block.stop - block.start, rows, call)
        for part, columns in zip(parts, chunks, strict=False):
            chunk_weight = weight[columns].to(rows.dtype)
            for tile in tiling.tiles(block):
                logits = work.tile(tile, columns, _place(block, tile, columns, rows.device))
                logits_of(rows[tile], chunk_weight, logits)
                if joined is None:
                    state_of_tile(call, logits, part[:, inside(tile, block)], tile, columns, scale, consume=False)
                else:
                    _join(joined, call, logits, part[:, inside(tile, block)], tile, columns, scale)
        shard = call.ops.merge(parts, call.wanted)
        state = call.ops.merge(call.tp.gather_states(shard), call.wanted)
        found.append(statistics(state, call.outputs, vocabulary(call, state))[2])
        gradient = None if joined else _slopes(call, state, block)
        for columns in chunks:
            chunk_weight = weight[columns].to(rows.dtype)
            for tile in tiling.tiles(block):
                logits = work.tile(tile, columns, _place(block, tile, columns, rows.device))
                out = slope_room.tile(tile, columns, _place(block, tile, columns, rows.device))
                if gradient is not None:
                    dlogits_of_tile(call, logits, out, gradient.rows(inside(tile, block)), tile, columns, scale)
                sums.add(block, tile, columns, out, chunk_weight, rows[tile])
        sums.end_block(block)
    if not found:
        empty = empty_state(call.valid, 0, like=rows, dtype=wide_dtype(hidden.dtype))
        found.append(statistics(empty, call.outputs, vocabulary(call, empty))[2])
    whole = found[0] if len(found) == 1 else {name: torch.cat([part[name] for part in found]) for name in found[0]}
    return whole, *sums.finish()


def _joined_ops(call: HeadCall, rows: torch.Tensor, chunks: list[slice]) -> TorchOps | None:
    """The backend, where it can turn logits into dlogits while they are in the cache: nothing of a row is elsewhere."""
    alone = on_cpu(rows) and call.tp.group is None and len(chunks) == 1
    return call.ops if alone and isinstance(call.ops, TorchOps) else None


def _join(
    ops: TorchOps,
    call: HeadCall,
    logits: torch.Tensor,
    state: torch.Tensor,
    tile: slice,
    columns: slice,
    scale: torch.Tensor | float | None,
) -> None:
    """Writes the tile's state, and dlogits over its logits."""
    ops.row_state_and_dlogits(
        logits,
        logits,
        state,
        call.wanted,
        lambda part, band: _slopes(call, part, slice(tile.start + band.start, tile.start + band.stop)),
        target=None if call.target is None else call.target[tile],
        first=call.first + columns.start,
        inv_tau=cut(scale, tile),
        whole=is_whole(call, columns),
    )


def _slopes(call: HeadCall, state: torch.Tensor, rows: slice) -> Slopes:
    """Slopes of the loss in the logits of `rows`, whose state over the whole vocabulary is `state` `[8, r]`."""
    assert call.upstream is not None
    vocab = vocabulary(call, state)
    lse, entropy, _ = statistics(state, call.outputs, vocab)
    return slopes(lse, entropy, {name: value[rows] for name, value in call.upstream.items()}, vocab)


def _place(block: slice, tile: slice, columns: slice, device: torch.device) -> int:
    """Where a tile begins in a buffer of a block's whole rows: chunk after chunk, tile after tile."""
    pitch = row_pitch(columns.stop - columns.start, device)
    return (block.stop - block.start) * columns.start + (tile.start - block.start) * pitch


def _row_count(hidden: torch.Tensor, call: HeadCall) -> int:
    if call.row_index is not None:
        return call.row_index.shape[0]
    return hidden.shape[0] * (call.tp.size if call.sequence_parallel else 1)


def _one_pass_tiling(count: int, call: HeadCall, like: torch.Tensor) -> Tiling:
    """Blocks have a collective each: their size is made of what all ranks know alike."""
    agreed = call.valid if call.tp.group is None else -(-(call.vocab_size or 0) // call.tp.size)
    size = call.logits_dtype.itemsize
    # Each block adds to all of dW: a GPU, whose memory traffic that is, uses the stash's budget for larger blocks.
    budget = call.workspace_bytes if on_cpu(like) else max(call.workspace_bytes, call.stash_bytes)
    return tile_one_pass(count, agreed, itemsize=size, device=like.device, workspace_bytes=budget)
