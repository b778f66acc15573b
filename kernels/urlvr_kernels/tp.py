"""Tensor parallelism: the few collectives of the kernels, over any torch.distributed backend.

Every rank of the group holds the same target, temperature, row index and incoming gradients, and a shard of the
vocabulary; shards may be unequal, in any order of the ranks.
"""

from __future__ import annotations

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

    def gather_states(self, state: torch.Tensor) -> torch.Tensor:
        """`[8, T]` of this rank's shard -> `[ranks, 8, T]`, the same bits on every rank."""
        if self.group is None or state.shape[1] == 0:
            return state.unsqueeze(0)
        # gloo takes only outputs that concatenate along dimension 0; hence the flat buffer.
        flat = state.new_empty(self.size * state.shape[0], state.shape[1])
        dist.all_gather_into_tensor(flat, state.contiguous(), group=self.group)
        return flat.view(self.size, *state.shape)

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
