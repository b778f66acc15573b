"""How much of the logits exists at once: sizes of blocks, tiles and chunks for a device and a workspace budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CPU_TILE_BYTES = 8 << 20
"""Tall tiles: a GEMM packs its weight chunk once a tile. What reads them goes through in bands (`torch_ops`)."""
CPU_TILE_ROWS = 2048
CPU_BLOCK_BYTES = 31 << 20
"""Whole rows of the one-pass form. Memory of 32 MiB and more is given back to the system and fetched anew, page by
page, at every call (glibc); that costs more than the further passes over dW."""
CPU_PITCH_PERIOD = 256
"""Rows a multiple of so many elements apart fall on the same few places of a cache, which is felt by a GEMM that reads
columns."""
GPU_FORWARD_BYTES = 32 << 20
"""A forward chunk that nobody keeps: it stays in an H100's 50 MB of L2 between the GEMM and its reader."""
MAX_BLOCK_ROWS = 16384
"""Rows of one GPU block: bounds the float32 gradient buffer of a block, and keeps offsets inside it 32-bit."""
GPU_MEMORY_GOAL = 298_000_000
"""Bytes a GPU's backward tries to stay under, dH's float32 sum and the logits chunk together."""
GPU_MIN_CHUNK = 1792
"""Columns a GPU chunk has at least: each chunk reads and writes all of dH's sum."""
GPU_CHUNK_ALIGN = 256
"""Columns of a GPU chunk are a multiple of this, so that GEMM tiles are full and rows aligned."""


def row_pitch(columns: int, device: torch.device) -> int:
    """Elements from one row of a logits buffer to the next; never less for more columns.

    On GPUs rows begin on 128-byte borders (for 2-byte types), so that GEMMs and kernels move 16 bytes at a time
    whatever the number of columns; on CPUs wide rows avoid the distances that are bad for caches.
    """
    if device.type != "cpu":
        return -(-columns // 64) * 64
    if columns < CPU_PITCH_PERIOD:
        return columns
    aligned = -(-columns // 16) * 16
    return aligned if aligned % CPU_PITCH_PERIOD else aligned + 16


@dataclass(frozen=True)
class Tiling:
    """Blocks of rows, cut into tiles of `tile_rows`; columns in chunks of `chunk` columns.

    A block's gradient is accumulated over the chunks before the next block begins; a chunk's weight is read once a
    block.
    """

    block_rows: int
    tile_rows: int
    chunk: int

    def blocks(self, rows: int) -> list[slice]:
        """Slices of rows, one a block."""
        return [slice(i, min(i + self.block_rows, rows)) for i in range(0, rows, self.block_rows)]

    def tiles(self, block: slice) -> list[slice]:
        """Slices of rows inside a block, one a tile."""
        return [slice(i, min(i + self.tile_rows, block.stop)) for i in range(block.start, block.stop, self.tile_rows)]

    def chunks(self, columns: int) -> list[slice]:
        """Slices of columns, one a chunk."""
        return [slice(i, min(i + self.chunk, columns)) for i in range(0, columns, self.chunk)]


def tile_head(
    rows: int,
    columns: int,
    *,
    width: int,
    itemsize: int,
    device: torch.device,
    workspace_bytes: int,
    transient: bool = False,
    many_blocks: bool = False,
) -> Tiling:
    """Sizes for the LM head: `rows` x `columns` logits of `itemsize` bytes, at most `workspace_bytes` at once.

    width: of the hidden states, whose gradient is summed in float32; transient: each chunk is read once, right after it
    was computed; many_blocks: dW is summed in place anyway, so blocks of rows may be as small as memory wants them.
    """
    rows, columns = max(rows, 1), max(columns, 1)
    if device.type == "cpu":
        budget = max(min(workspace_bytes, CPU_TILE_BYTES), 4096)
        if rows * columns * itemsize <= budget:
            return Tiling(rows, rows, columns)
        tile_rows = min(rows, CPU_TILE_ROWS)
        chunk = max(1, budget // (tile_rows * itemsize))
        if chunk >= columns:  # narrow vocabularies: taller tiles instead
            return Tiling(rows, min(rows, max(1, budget // (columns * itemsize))), columns)
        return Tiling(rows, tile_rows, chunk)
    block = min(rows, MAX_BLOCK_ROWS)
    if transient:
        chunk = min(workspace_bytes, GPU_FORWARD_BYTES) // (block * itemsize)
    else:
        if many_blocks:
            block = min(block, max(1024, workspace_bytes // (4 * width) // 128 * 128))
        beside_sum = max(GPU_MEMORY_GOAL - 4 * width * block, GPU_MIN_CHUNK * block * itemsize)
        chunk = min(workspace_bytes, beside_sum) // (block * itemsize)
    chunk = max(chunk // GPU_CHUNK_ALIGN * GPU_CHUNK_ALIGN, GPU_CHUNK_ALIGN)
    return Tiling(block, block, min(chunk, columns))


def tile_one_pass(rows: int, columns: int, *, itemsize: int, device: torch.device, workspace_bytes: int) -> Tiling:
    """Sizes for the one-pass form, which holds whole rows of logits: blocks small enough for the workspace.

    columns: what every rank agrees on (the collective of each block must match), not this rank's own width.
    """
    rows, columns = max(rows, 1), max(columns, 1)
    cpu = device.type == "cpu"
    budget, align = (min(workspace_bytes, CPU_BLOCK_BYTES), 16) if cpu else (workspace_bytes, 128)
    block = min(rows, max(1, budget // (row_pitch(columns, device) * itemsize)))
    if block >= align:
        block = block // align * align
    return Tiling(block, block, columns)


def tile_logits(rows: int, columns: int, *, itemsize: int, device: torch.device) -> Tiling:
    """Sizes for statistics from materialised logits: bounds what plain torch holds beside them."""
    rows, columns = max(rows, 1), max(columns, 1)
    budget = CPU_TILE_BYTES if device.type == "cpu" else 64 << 20
    chunk = min(columns, max(1, budget // itemsize // min(rows, 16)))
    tile_rows = min(rows, max(1, budget // (chunk * itemsize)))
    return Tiling(rows, tile_rows, chunk)
