"""The loops of the head: forward over tiles, and backward over tiles. Both at once: `one_pass`.

Logits exist one tile at a time. The forward keeps the log-sum-exp and the entropy of each row, and as many tiles of
logits as the stash budget holds; the backward recomputes the others:

    two-pass   forward: logits tile -> state            backward: tile again -> dlogits -> dH, dW      8 T H V flops
    stash      the same without the second logits GEMM                                                 6 T H V
    one-pass   forward: block of whole rows -> state -> dlogits -> dH, dW; backward hands them over    6 T H V

Chunks run over the vocabulary, so a chunk's rows of dW are complete after one pass over a block's rows, and dH is the
only running sum. Extra memory of the two-pass form: one tile of logits, and dH in float32 where the hidden states are
narrower.
"""

from __future__ import annotations

import torch

from .call import HeadCall, cut, logit_scale, read_rows
from .device import on_cpu, wide_dtype
from .gemm import logits_of
from .gradients import HiddenGrad, WeightGrad
from .rowstate import COUNT, FIELDS, Slopes, empty_state
from .tiling import Tiling, row_pitch, tile_head


def _tile_view(flat: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`[rows, columns]` at the start of a flat buffer, rows a `row_pitch` apart."""
    pitch = row_pitch(columns, flat.device)
    return flat[: rows * pitch].view(rows, pitch)[:, :columns]


class Stash:
    """Tiles of logits kept for the backward, up to a budget of bytes."""

    def __init__(self, budget: int) -> None:
        self._left = budget
        self._kept: dict[tuple[int, int], torch.Tensor] = {}

    def room(self, tile: slice, columns: slice, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """A buffer for this tile's logits that will be kept, or None when the budget is spent."""
        rows, width = tile.stop - tile.start, columns.stop - columns.start
        elements = rows * row_pitch(width, like.device)
        if elements * dtype.itemsize > self._left:
            return None
        self._left -= elements * dtype.itemsize
        kept = _tile_view(like.new_empty(elements, dtype=dtype), rows, width)
        self._kept[tile.start, columns.start] = kept
        return kept

    def get(self, tile: slice, columns: slice) -> torch.Tensor | None:
        """The kept logits of this tile, if they were kept."""
        return self._kept.get((tile.start, columns.start))


class Workspace:
    """One buffer for `rows` x `columns` logits, viewed as the tile that is needed; allocated on first use."""

    def __init__(self, rows: int, columns: int, like: torch.Tensor, dtype: torch.dtype) -> None:
        self.rows, self.columns, self._like, self._dtype = rows, columns, like, dtype
        self._flat: torch.Tensor | None = None

    def tile(self, rows: slice, columns: slice, offset: int = 0) -> torch.Tensor:
        """A `[rows, columns]` view that begins `offset` elements into the buffer."""
        if self._flat is None:
            size = self.rows * row_pitch(self.columns, self._like.device)
            self._flat = self._like.new_empty(size, dtype=self._dtype)
        return _tile_view(self._flat[offset:], rows.stop - rows.start, columns.stop - columns.start)


def room_for_states(chunks: list[slice], rows: int, like: torch.Tensor, call: HeadCall) -> torch.Tensor:
    """Room for the states of a block's chunks, `[n, 8, rows]`."""
    wide = wide_dtype(like.dtype)
    if not chunks:  # a shard of padding alone
        return empty_state(0, rows, like=like, dtype=wide).unsqueeze(0)
    parts = like.new_empty(len(chunks), FIELDS, rows, dtype=wide)
    if len(chunks) > 1 or call.shard.tp.group is not None:  # a state that is merged with nothing needs no count
        parts[:, COUNT].fill_(chunks[0].stop)
        parts[-1, COUNT].fill_(chunks[-1].stop - chunks[-1].start)
    return parts


def _two_pass_tiling(rows: int, call: HeadCall, like: torch.Tensor, *, transient: bool) -> Tiling:
    return tile_head(
        rows,
        call.shard.valid,
        width=like.shape[1],
        itemsize=call.logits_dtype.itemsize,
        device=like.device,
        workspace_bytes=call.workspace_bytes,
        transient=transient,
        many_blocks=call.wgrad == "main_grad" and call.shard.tp.group is None,
    )


def forward_pass(
    hidden: torch.Tensor, weight: torch.Tensor, call: HeadCall, *, stash_bytes: int
) -> tuple[torch.Tensor, Stash]:
    """State over the whole vocabulary `[8, R]`, and the tiles kept on the way."""
    rows = read_rows(hidden, call)
    wide = wide_dtype(hidden.dtype)
    scale = logit_scale(hidden, call)
    tiling = _two_pass_tiling(rows.shape[0], call, rows, transient=stash_bytes == 0)
    stash = Stash(stash_bytes)
    work = Workspace(tiling.tile_rows, tiling.chunk, rows, call.logits_dtype)
    chunks = tiling.chunks(call.shard.valid)
    states = []
    for block in tiling.blocks(rows.shape[0]):
        parts = room_for_states(chunks, block.stop - block.start, rows, call)
        for part, columns in zip(parts, chunks, strict=False):
            chunk_weight = weight[columns].to(rows.dtype)
            for tile in tiling.tiles(block):
                kept = stash.room(tile, columns, rows, call.logits_dtype)
                logits = work.tile(tile, columns) if kept is None else kept
                logits_of(rows[tile], chunk_weight, logits)
                state_of_tile(call, logits, part[:, inside(tile, block)], tile, columns, scale, consume=kept is None)
        states.append(call.ops.merge(parts, call.wanted))
    state = (
        states[0] if len(states) == 1 else torch.cat(states, 1) if states else empty_state(0, 0, like=rows, dtype=wide)
    )
    return call.shard.join(state, call.rows.target, call.ops, call.wanted), stash


def backward_pass(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    call: HeadCall,
    gradient: Slopes,
    stash: Stash,
    need: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of hidden and weight (`need`: which of them), tiles taken from the stash or computed again."""
    count = gradient.lse.shape[0]
    tiling = _two_pass_tiling(count, call, hidden, transient=False)
    sums = Sums(hidden, weight, call, count, tiling, need)
    rows = read_rows(hidden, call, sums.room)
    work = Workspace(tiling.tile_rows, tiling.chunk, rows, call.logits_dtype)
    slope_room = room_for_dlogits(work, rows, call)
    scale = logit_scale(hidden, call)
    for block in tiling.blocks(count):
        for columns in tiling.chunks(call.shard.valid):
            chunk_weight = weight[columns].to(rows.dtype)
            for tile in tiling.tiles(block):
                logits = stash.get(tile, columns)
                if logits is None:
                    logits = work.tile(tile, columns)
                    logits_of(rows[tile], chunk_weight, logits)
                out = slope_room.tile(tile, columns)
                dlogits_of_tile(call, logits, out, gradient.rows(tile), tile, columns, scale)
                sums.add(block, tile, columns, out, chunk_weight, rows[tile])
        sums.end_block(block)
    return sums.finish()


class Sums:
    """The two gradients while they are being summed."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        call: HeadCall,
        count: int,
        tiling: Tiling,
        need: tuple[bool, bool],
    ) -> None:
        self._hidden = HiddenGrad(count, hidden, call, tiling) if need[0] else None
        self._weight = WeightGrad(count, weight, call, tiling) if need[1] else None
        self._end = (count, call.shard.valid)

    @property
    def room(self) -> torch.Tensor | None:
        """See `HiddenGrad.room`."""
        return None if self._hidden is None else self._hidden.room

    def add(
        self, block: slice, tile: slice, columns: slice, dlogits: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor
    ) -> None:
        """Takes in one tile: dlogits `[r, c]`, the chunk's weight `[c, H]`, the tile's hidden rows `[r, H]`."""
        if self._hidden is not None:
            self._hidden.add(block, tile, dlogits, weight, fresh=columns.start == 0)
            if (tile.stop, columns.stop) == self._end:
                self._hidden.last_tile_done()
        if self._weight is not None:
            self._weight.add(columns, dlogits, rows, fresh=tile.start == 0)

    def end_block(self, block: slice) -> None:
        """All tiles of `block` are in."""
        if self._hidden is not None:
            self._hidden.end_block(block)

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The gradients for autograd."""
        weight = None if self._weight is None else self._weight.finish()
        return None if self._hidden is None else self._hidden.finish(), weight


def state_of_tile(
    call: HeadCall,
    logits: torch.Tensor,
    state: torch.Tensor,
    tile: slice,
    columns: slice,
    scale: torch.Tensor | float | None,
    *,
    consume: bool,
) -> None:
    call.ops.row_state(
        logits,
        state,
        call.wanted,
        target=None if call.rows.target is None else call.rows.target[tile],
        first=call.shard.first + columns.start,
        inv_tau=cut(scale, tile),
        whole=is_whole(call, columns),
        consume=consume,
    )


def dlogits_of_tile(
    call: HeadCall,
    logits: torch.Tensor,
    out: torch.Tensor,
    gradient: Slopes,
    tile: slice,
    columns: slice,
    scale: torch.Tensor | float | None,
) -> None:
    call.ops.dlogits(
        logits,
        out,
        gradient,
        target=None if call.rows.target is None else call.rows.target[tile],
        first=call.shard.first + columns.start,
        inv_tau=cut(scale, tile),
        whole=is_whole(call, columns),
    )


def is_whole(call: HeadCall, columns: slice) -> bool:
    """Whether every row's target is known to be among these columns."""
    return (
        call.shard.tp.group is None and call.rows.ignored is None and columns.stop - columns.start == call.shard.valid
    )


def inside(tile: slice, block: slice) -> slice:
    """The rows of `tile` counted from the start of `block`."""
    return slice(tile.start - block.start, tile.stop - block.start)


def room_for_dlogits(work: Workspace, rows: torch.Tensor, call: HeadCall) -> Workspace:
    """Where dlogits go: over the logits, except where a GPU's GEMMs want them narrower than the logits."""
    if not on_cpu(rows) and rows.dtype != call.logits_dtype:
        return Workspace(work.rows, work.columns, rows, rows.dtype)
    return work
