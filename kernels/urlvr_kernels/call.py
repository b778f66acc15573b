"""One call of the head, checked and resolved, and what a backend is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .device import gemm_dtype, wide_dtype
from .rowstate import Slopes, Wanted
from .tp import TensorParallel


class Ops(Protocol):
    """A backend: what is done to a tile of logits. See `torch_ops.TorchOps` for the contract of the two operations."""

    name: str
    fused: bool
    """Whether the operations work through a tile of any size without memory of its size."""

    def row_state(
        self,
        logits: torch.Tensor,
        state: torch.Tensor,
        wanted: Wanted,
        *,
        target: torch.Tensor | None,
        first: int,
        inv_tau: torch.Tensor | float | None,
        whole: bool = False,
        consume: bool = False,
        masked: bool = False,
    ) -> None:
        """Writes the state of a tile `[R, C]` into `state` `[8, R]`."""

    def dlogits(
        self,
        logits: torch.Tensor,
        out: torch.Tensor,
        slopes: Slopes,
        *,
        target: torch.Tensor | None,
        first: int,
        inv_tau: torch.Tensor | float | None,
        whole: bool = False,
        masked: bool = False,
    ) -> None:
        """Writes the gradient with respect to a tile of logits into `out`."""

    def merge(self, states: torch.Tensor, wanted: Wanted) -> torch.Tensor:
        """Merges the states of disjoint columns, `[n, 8, T]` -> `[8, T]`."""


@dataclass(frozen=True)
class HeadCall:
    """One call's arguments, checked and resolved. `R` is the number of rows that are read."""

    ops: Ops
    outputs: tuple[str, ...]
    target: torch.Tensor | None
    """`[R]` global ids."""
    inv_tau: torch.Tensor | float | None
    """Inverse temperature, `[R]` or a number; None for 1."""
    row_index: torch.Tensor | None
    """`[R]` rows of the (gathered) hidden states; None for all of them."""
    ignored: torch.Tensor | None
    """`[R]` bool: rows to be treated as if their hidden state were zero; None where there are none."""
    first: int
    valid: int
    """Columns of this shard that are real vocabulary; the padding is behind them."""
    vocab_size: int | None
    """Real entries of the whole vocabulary; None: the sum of all shards' columns."""
    tp: TensorParallel
    sequence_parallel: bool
    logits_dtype: torch.dtype
    stash_bytes: int
    workspace_bytes: int
    wgrad: str
    upstream: dict[str, torch.Tensor] | None

    @property
    def wanted(self) -> Wanted:
        """Which parts of the state the outputs need."""
        return Wanted.of(self.outputs)


def folds_temperature(hidden: torch.Tensor) -> bool:
    """Whether 1/tau scales the hidden rows (`T H` products) instead of every logit; exact enough in wide types only."""
    return gemm_dtype(hidden) == wide_dtype(hidden.dtype)


def read_rows(hidden: torch.Tensor, call: HeadCall, room: torch.Tensor | None = None) -> torch.Tensor:
    """The rows `[R, H]` the head reads: gathered, selected, ignored ones zeroed (in `room` if given), widened."""
    rows = call.tp.gather_rows(hidden) if call.sequence_parallel else hidden
    if call.row_index is not None:
        rows = rows.index_select(0, call.row_index)
    if call.ignored is not None:
        mask = call.ignored.unsqueeze(1)
        if rows is not hidden:
            rows.masked_fill_(mask, 0.0)
        elif room is not None:
            rows = room.copy_(rows).masked_fill_(mask, 0.0)
        else:
            rows = rows.masked_fill(mask, 0.0)
    rows = rows.to(gemm_dtype(hidden))
    if call.inv_tau is not None and folds_temperature(hidden):
        rows = rows * (call.inv_tau.unsqueeze(1) if isinstance(call.inv_tau, torch.Tensor) else call.inv_tau)
    return rows


def logit_scale(hidden: torch.Tensor, call: HeadCall) -> torch.Tensor | float | None:
    """The inverse temperature that is left to apply to logits."""
    return None if folds_temperature(hidden) else call.inv_tau


def row_scale(hidden: torch.Tensor, call: HeadCall) -> torch.Tensor | float | None:
    """The inverse temperature that the hidden gradient is multiplied by at the end."""
    return call.inv_tau if folds_temperature(hidden) else None


def cut(value: torch.Tensor | float | None, index: slice) -> torch.Tensor | float | None:
    """`value[index]` of a tensor; a number or None as it is."""
    return value[index] if isinstance(value, torch.Tensor) else value
