"""Where the head's two gradients are accumulated, and Megatron's contract for the weight's."""

from __future__ import annotations

import torch

from .call import HeadCall, cut, row_scale
from .device import on_cpu, wide_dtype
from .gemm import accumulate
from .tiling import Tiling
from .tp import PendingSum


class HiddenGrad:
    """Gradient of the hidden rows the head read, `[R, H]`, summed over vocabulary chunks in float32 (float64).

    Half-precision gradients go through a float32 buffer of one block. Under tensor parallelism all rows stay in float32
    until the ranks are summed, so that every group size gives the same result to float32 rounding.
    """

    def __init__(self, rows: int, hidden: torch.Tensor, call: HeadCall, tiling: Tiling) -> None:
        self._hidden, self._call, self._scale = hidden, call, row_scale(hidden, call)
        self._pending: PendingSum | None = None
        wide, width = wide_dtype(hidden.dtype), hidden.shape[1]
        self._parallel = call.shard.tp.group is not None
        self._total = hidden.new_empty(rows, width, dtype=wide if self._parallel else hidden.dtype)
        if call.shard.valid == 0:
            self._total.zero_()
        self._buffer: torch.Tensor | None = None
        if self._total.dtype != wide:
            self._buffer = hidden.new_empty(min(tiling.block_rows, rows), width, dtype=wide)

    @property
    def room(self) -> torch.Tensor | None:
        """`[R, H]` in the hidden type, free for other use: a block's rows are written when the block ends."""
        return None if self._buffer is None else self._total

    def add(self, block: slice, tile: slice, dlogits: torch.Tensor, weight: torch.Tensor, *, fresh: bool) -> None:
        """Adds `dlogits @ weight` to the rows of `tile`, which lies in `block`."""
        if self._buffer is None:
            rows = self._total[tile]
        else:
            rows = self._buffer[tile.start - block.start : tile.stop - block.start]
        accumulate(rows, dlogits, weight, fresh=fresh)

    def end_block(self, block: slice) -> None:
        """All chunks of `block` are in: applies the temperature and rounds to the final type."""
        if self._parallel:
            return
        rows = self._total[block] if self._buffer is None else self._buffer[: block.stop - block.start]
        _scale_rows(rows, cut(self._scale, block))
        if self._buffer is not None and self._call.shard.valid:
            self._total[block].copy_(rows)

    def last_tile_done(self) -> None:
        """Every product is in: starts the sum over the ranks, so that the last product of the weight overlaps it."""
        if self._parallel:
            self._start_sum()

    def _start_sum(self) -> None:
        if self._parallel:
            _scale_rows(self._total, self._scale)
        total = self._total
        if self._call.rows.index is not None:
            rows = self._hidden.shape[0] * (self._call.shard.tp.size if self._call.sequence_parallel else 1)
            total = _spread(total, self._call.rows.index, rows)
        self._pending = self._call.shard.tp.sum_over_ranks(total, scatter=self._call.sequence_parallel)

    def finish(self) -> torch.Tensor:
        """The gradient of the `hidden` that was passed in, in its shape and type."""
        if self._pending is None:
            self._start_sum()
        assert self._pending is not None
        return self._pending.wait().to(self._hidden.dtype)


def _spread(total: torch.Tensor, row_index: torch.Tensor, rows: int) -> torch.Tensor:
    """`[rows, H]` with `total` summed into the rows it was read from; in a fixed order where a row was read twice."""
    out = total.new_zeros(rows, total.shape[1])
    if on_cpu(total):
        return out.index_add_(0, row_index, total)
    return out.index_put_((row_index,), total, accumulate=True)  # sorts; a GPU's index_add_ uses atomics


def _scale_rows(rows: torch.Tensor, scale: torch.Tensor | float | None) -> None:
    if scale is not None:
        rows.mul_(scale.unsqueeze(1) if isinstance(scale, torch.Tensor) else scale)


class WeightGrad:
    """Gradient of the weight shard, written chunk by chunk; straight into `weight.main_grad` where asked.

    The gradient of vocabulary padding is zero (nothing is added to its rows of `main_grad`).
    """

    def __init__(self, rows: int, weight: torch.Tensor, call: HeadCall, tiling: Tiling) -> None:
        self._weight = weight
        self._into_main = call.wgrad == "main_grad"
        if self._into_main:
            self._total: torch.Tensor = weight.main_grad  # type: ignore[attr-defined]
            return
        # A chunk that is written once is rounded once, by the GEMM itself; several writes need a wide sum.
        written_once = not on_cpu(weight) and rows <= tiling.tile_rows
        dtype = weight.dtype if written_once else wide_dtype(weight.dtype)
        self._total = weight.new_empty(weight.shape, dtype=dtype)
        written = call.shard.valid if rows else 0
        if written < weight.shape[0]:
            self._total[written:].zero_()

    def add(self, columns: slice, dlogits: torch.Tensor, hidden: torch.Tensor, *, fresh: bool) -> None:
        """Adds `dlogits.T @ hidden` to the rows of the vocabulary chunk `columns`; `fresh`: the first."""
        accumulate(self._total[columns], dlogits.t(), hidden, fresh=fresh and not self._into_main)

    def finish(self) -> torch.Tensor | None:
        """The gradient in the weight's type; None where it is in `main_grad` already (then `announce_main_grad`)."""
        return None if self._into_main else self._total.to(self._weight.dtype)


def announce_main_grad(weight: torch.Tensor) -> torch.Tensor | None:
    """Tells Megatron's DDP that `main_grad` holds the gradient already, as its own linear layer does.

    Returns a placeholder of the weight's shape so that DDP's hooks fire; its content is ignored, except under
    `zero_out_wgrad` (embedding tied to the head on one stage), where DDP adds it and it must be zero. None for a weight
    without `grad_added_to_main_grad`: nobody's hook is waiting.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight, requires_grad=False)
    return torch.empty_like(weight, requires_grad=False)
