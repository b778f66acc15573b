"""Statistics and gradients of the head in one pass, for gradients that are known beforehand.

Blocks of whole rows: logits, their state, dlogits, dH and dW. Under tensor parallelism, and on GPUs, the state of a
block is complete before its first dlogits; on a CPU that holds whole rows both are made band by band, in the cache.
"""

from __future__ import annotations

import torch

from .call import HeadCall, logit_scale, read_rows
from .device import on_cpu, wide_dtype
from .gemm import logits_of
from .passes import Sums, Workspace, dlogits_of_tile, is_whole, room_for_dlogits, room_for_states, state_of_tile
from .rowstate import empty_state, incoming, statistics
from .tiling import Tiling, tile_one_pass
from .torch_ops import TorchOps


def one_pass(
    hidden: torch.Tensor, weight: torch.Tensor, call: HeadCall, need: tuple[bool, bool]
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
    """Statistics, and gradients of `sum upstream[k] * k`, in one pass over blocks of whole rows of logits."""
    assert call.rows.upstream is not None
    count, wide = _row_count(hidden, call), wide_dtype(hidden.dtype)
    tiling = _tiling(count, call, hidden)
    sums = Sums(hidden, weight, call, count, tiling, need)
    rows = read_rows(hidden, call, sums.room)
    scale = logit_scale(hidden, call)
    work = Workspace(tiling.block_rows, call.shard.valid, rows, call.logits_dtype)
    slope_room = room_for_dlogits(work, rows, call)
    joined = _joined_ops(call, rows)
    assert call.shard.known_size is not None  # `checks.check_parallel` sees to it
    gradient = incoming(call.rows.upstream, call.shard.known_size, wide)
    columns = slice(0, call.shard.valid)
    chunks = [columns] if call.shard.valid else []  # a shard of padding alone has no logits, but meets the others
    valid_weight = weight[columns].to(rows.dtype)
    found: list[dict[str, torch.Tensor]] = []
    for block in tiling.blocks(count):
        parts = room_for_states(chunks, block.stop - block.start, rows, call)
        if chunks:
            logits = out = work.tile(block, columns)
            logits_of(rows[block], valid_weight, logits)
            if joined is None:
                state_of_tile(call, logits, parts[0], block, columns, scale, consume=False)
            else:
                joined.state_and_dlogits(
                    logits,
                    parts[0],
                    call.wanted,
                    gradient.rows(block),
                    target=None if call.rows.target is None else call.rows.target[block],
                    first=call.shard.first,
                    whole=is_whole(call, columns),
                )
        target = None if call.rows.target is None else call.rows.target[block]
        state = call.shard.join(parts[0], target, call.ops, call.wanted)
        lse, entropy, values = statistics(state, call.outputs, call.shard.known_size)
        found.append(values)
        if chunks:
            if joined is None:
                out = slope_room.tile(block, columns)
                dlogits_of_tile(call, logits, out, gradient.rows(block).slopes(lse, entropy), block, columns, scale)
            sums.add(block, block, columns, out, valid_weight, rows[block])
        sums.end_block(block)
    if not found:
        empty = empty_state(call.shard.valid, 0, like=rows, dtype=wide)
        empty = call.shard.join(empty, call.rows.target, call.ops, call.wanted)
        found.append(statistics(empty, call.outputs, call.shard.known_size)[2])
    whole = found[0] if len(found) == 1 else {name: torch.cat([part[name] for part in found]) for name in found[0]}
    return whole, *sums.finish()


def _joined_ops(call: HeadCall, rows: torch.Tensor) -> TorchOps | None:
    """The backend, where it can turn logits into dlogits while they are in the cache.

    Nothing of a row is on another rank, nothing is rounded between the two, and no order of the logits is asked for.
    """
    alone = on_cpu(rows) and call.shard.tp.group is None and call.logits_dtype == wide_dtype(rows.dtype)
    plain = not (call.wanted.second or call.wanted.argmax)
    return call.ops if alone and plain and isinstance(call.ops, TorchOps) else None


def _row_count(hidden: torch.Tensor, call: HeadCall) -> int:
    if call.rows.index is not None:
        return call.rows.index.shape[0]
    return hidden.shape[0] * (call.shard.tp.size if call.sequence_parallel else 1)


def _tiling(count: int, call: HeadCall, like: torch.Tensor) -> Tiling:
    """Blocks have a collective each: their size is made of what all ranks know alike."""
    shard = call.shard
    agreed = shard.valid if shard.tp.group is None else -(-(shard.vocab_size or 0) // shard.tp.size)
    size = call.logits_dtype.itemsize
    # Each block adds to all of dW: a GPU, whose memory traffic that is, uses the stash's budget for larger blocks.
    budget = call.workspace_bytes if on_cpu(like) else max(call.workspace_bytes, call.stash_bytes)
    return tile_one_pass(count, agreed, itemsize=size, device=like.device, workspace_bytes=budget)
