"""One call of the head, checked and resolved, and what a backend is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from .checks import check_shards
from .device import gemm_dtype, wide_dtype
from .rowstate import COUNT, Slopes, Wanted
from .stats import TokenStats
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
class Shard:
    """This rank's part of the vocabulary."""

    first: int
    """Global id of the first column."""
    valid: int
    """Columns that are real vocabulary; the padding is behind them."""
    vocab_size: int | None
    """Real entries of the whole vocabulary, as the caller gave it; None: all columns of all shards."""
    tp: TensorParallel
    refusal: str | None = None
    """Why this rank cannot do its part. It meets the others all the same, as padding alone, so that they learn of it
    instead of waiting for it."""

    @property
    def layout(self) -> tuple[int, int, int, int]:
        """What the other ranks are told of this shard; see `checks.check_shards`."""
        first = self.first if self.vocab_size is None else min(self.first, self.vocab_size)
        return first, first + self.valid, self.vocab_size or 0, int(self.refusal is not None)

    @property
    def known_size(self) -> int | None:
        """Real entries of the whole vocabulary, where this rank knows them without asking the others."""
        return self.valid if self.vocab_size is None and self.tp.group is None else self.vocab_size

    def size(self, state: torch.Tensor) -> int | torch.Tensor:
        """Real entries of the whole vocabulary; a tensor `[R]` where only its merged `state` `[8, R]` knows them."""
        return state[COUNT] if self.known_size is None else self.known_size

    def join(self, state: torch.Tensor, target: torch.Tensor | None, ops: Ops, wanted: Wanted) -> torch.Tensor:
        """This shard's `state` `[8, R]` -> that of the whole vocabulary, the same bits on every rank.

        The shards' layout travels with the states. If it, or `target` `[R]`, or a rank's arguments cannot be right,
        every rank refuses: on a CPU with ValueError, on a GPU without waiting (`checks.require_everywhere`).
        """
        if self.tp.group is None:
            return state
        states, layout = self.tp.gather_states(state, self.layout)
        if self.refusal is not None:
            raise ValueError(self.refusal)
        check_shards(layout, self.vocab_size, target)
        return ops.merge(states, wanted)


@dataclass(frozen=True)
class Rows:
    """What belongs to the rows that are read, `[R]` each."""

    target: torch.Tensor | None
    """Global ids."""
    inv_tau: torch.Tensor | float | None
    """Inverse temperature, `[R]` or a number; None for 1."""
    index: torch.Tensor | None
    """Rows of the (gathered) hidden states; None for all of them."""
    upstream: dict[str, torch.Tensor] | None
    """Gradients known beforehand, by statistic."""
    ignored: torch.Tensor | None
    """bool: rows to be treated as if their hidden state were zero; None where there are none."""
    asked: int
    """Rows the caller asked for, ignored ones among them."""
    kept: torch.Tensor | None = None
    """Numbers, among those, of the rows that are read; None for all of them."""

    def without_ignored(self) -> Rows:
        """The rows that carry a target. Looks at values: for CPUs."""
        if self.ignored is None:
            return self
        keep = torch.nonzero(~self.ignored).squeeze(1)
        return Rows(
            target=None if self.target is None else self.target[keep],
            inv_tau=self.inv_tau[keep] if isinstance(self.inv_tau, torch.Tensor) else self.inv_tau,
            index=keep if self.index is None else self.index[keep],
            upstream=None if self.upstream is None else {name: value[keep] for name, value in self.upstream.items()},
            ignored=None,
            asked=self.asked,
            kept=keep,
        )

    def with_ignored_blanked(self) -> Rows:
        """The same rows; gradients known beforehand are zero where they are ignored."""
        if self.ignored is None or self.upstream is None:
            return self
        blanked = {name: value.masked_fill(self.ignored, 0.0) for name, value in self.upstream.items()}
        return replace(self, upstream=blanked)

    def spread(self, found: dict[str, torch.Tensor]) -> TokenStats:
        """Statistics of the rows that were read -> of all rows asked for: the others' are 0, their argmax -1."""
        out = TokenStats(loss=found.pop("loss", None))
        for name, value in found.items():
            blank = -1 if name == "argmax" else 0
            if self.kept is not None:
                value = value.new_full((self.asked,), blank).index_copy(0, self.kept, value)
            elif self.ignored is not None:
                value = value.masked_fill(self.ignored, blank)
            setattr(out, name, value)
        return out


@dataclass(frozen=True)
class HeadCall:
    """One call's arguments, checked and resolved. `R` is the number of rows that are read."""

    ops: Ops
    outputs: tuple[str, ...]
    shard: Shard
    rows: Rows
    sequence_parallel: bool
    logits_dtype: torch.dtype
    stash_bytes: int
    workspace_bytes: int
    wgrad: str

    @property
    def wanted(self) -> Wanted:
        """Which parts of the state the outputs need."""
        return Wanted.of(self.outputs)


def folds_temperature(hidden: torch.Tensor) -> bool:
    """Whether 1/tau scales the hidden rows (`T H` products) instead of every logit; exact enough in wide types only."""
    return gemm_dtype(hidden) == wide_dtype(hidden.dtype)


def read_rows(hidden: torch.Tensor, call: HeadCall, room: torch.Tensor | None = None) -> torch.Tensor:
    """The rows `[R, H]` the head reads: gathered, selected, ignored ones zeroed (in `room` if given), widened."""
    rows = call.shard.tp.gather_rows(hidden) if call.sequence_parallel else hidden
    if call.rows.index is not None:
        rows = rows.index_select(0, call.rows.index)
    if call.rows.ignored is not None:
        mask = call.rows.ignored.unsqueeze(1)
        if rows is not hidden:
            rows.masked_fill_(mask, 0.0)
        elif room is not None:
            rows = room.copy_(rows).masked_fill_(mask, 0.0)
        else:
            rows = rows.masked_fill(mask, 0.0)
    rows = rows.to(gemm_dtype(hidden))
    if call.rows.inv_tau is not None and folds_temperature(hidden):
        rows = rows * (
            call.rows.inv_tau.unsqueeze(1) if isinstance(call.rows.inv_tau, torch.Tensor) else call.rows.inv_tau
        )
    return rows


def logit_scale(hidden: torch.Tensor, call: HeadCall) -> torch.Tensor | float | None:
    """The inverse temperature that is left to apply to logits."""
    return None if folds_temperature(hidden) else call.rows.inv_tau


def row_scale(hidden: torch.Tensor, call: HeadCall) -> torch.Tensor | float | None:
    """The inverse temperature that the hidden gradient is multiplied by at the end."""
    return call.rows.inv_tau if folds_temperature(hidden) else None


def cut(value: torch.Tensor | float | None, index: slice) -> torch.Tensor | float | None:
    """`value[index]` of a tensor; a number or None as it is."""
    return value[index] if isinstance(value, torch.Tensor) else value
