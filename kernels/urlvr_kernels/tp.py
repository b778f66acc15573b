"""Tensor parallelism: the few collectives of the kernels, over any torch.distributed backend.

Every rank of the group holds the same target, temperature, row index and incoming gradients, and a shard of the
vocabulary; shards may be unequal, in any order of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class TensorParallel:
    """A tensor-parallel group, or its absence (`group is None`: one rank, no collectives)."""

    group: dist.ProcessGroup | None = None
    size: int = 1
    rank: int = 0

    @staticmethod
    def of(group: dist.ProcessGroup | None) -> TensorParallel:
        """A view of `group`. A group of one rank is no group."""
        if group is None or dist.get_world_size(group) == 1:
            return TensorParallel()
        return TensorParallel(group, dist.get_world_size(group), dist.get_rank(group))

    def gather_states(self, state: torch.Tensor, about: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """`[8, T]` of this rank's shard, and a few numbers about the shard -> `[ranks, 8, T]` and `[ranks, numbers]`.

        The same bits on every rank. One collective, over no rows (T = 0) too: the numbers always arrive.
        """
        mine = state.new_empty(state.numel() + len(about))
        mine[: state.numel()].view(state.shape).copy_(state)
        for place, number in enumerate(about, start=state.numel()):
            mine[place].fill_(number)
        # gloo takes only outputs that concatenate along dimension 0; hence the flat buffer.
        flat = mine.new_empty(self.size * mine.numel())
        dist.all_gather_into_tensor(flat, mine, group=self.group)
        states, numbers = flat.view(self.size, -1).split([state.numel(), len(about)], dim=1)
        return states.view(self.size, *state.shape), numbers

    def gather_rows(self, shard: torch.Tensor) -> torch.Tensor:
        """Sequence-parallel input: `[T / size, H]` of each rank -> `[T, H]`."""
        if self.group is None:
            return shard
        full = shard.new_empty(self.size * shard.shape[0], *shard.shape[1:])
        if full.numel():
            dist.all_gather_into_tensor(full, shard.contiguous(), group=self.group)
        return full

    def sum_over_ranks(self, full: torch.Tensor, *, scatter: bool) -> PendingSum:
        """Starts the sum of `[T, H]` over the ranks; `scatter`: each rank gets its `[T / size, H]` alone."""
        if self.group is None or full.numel() == 0:
            return PendingSum(full[: full.shape[0] // self.size] if scatter else full, None)
        if not scatter:
            return PendingSum(full, dist.all_reduce(full, group=self.group, async_op=True))
        out = full.new_empty(full.shape[0] // self.size, *full.shape[1:])
        return PendingSum(out, dist.reduce_scatter_tensor(out, full, group=self.group, async_op=True))


@dataclass
class PendingSum:
    """A sum under way; `wait` returns it."""

    value: torch.Tensor
    work: dist.Work | None

    def wait(self) -> torch.Tensor:
        """The sum, once it is there."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.value
