"""How the weights travel to the servers: buckets of each pipeline stage, bytes and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .shards import Tensor
from .speed import GIGA, Trainer


@dataclass(frozen=True)
class StageSync:
    """What one pipeline stage contributes."""

    stage: int
    tensors: int
    bytes: int
    buckets: int
    """Buckets that end in this stage: they are filled tensor after tensor, over the border of stages."""


@dataclass(frozen=True)
class SyncPlan:
    """One update of all servers."""

    stages: list[StageSync]
    bucket_bytes: int
    """Where a bucket is full; a larger tensor makes one of its own."""
    largest_bucket: int
    seconds: dict[str, float]

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return sum(stage.bytes for stage in self.stages)

    @property
    def buckets(self) -> int:
        """Of all stages."""
        return sum(stage.buckets for stage in self.stages)


def bucket_ends(sizes: Sequence[int], limit: int) -> list[int]:
    """Index of the last tensor of each bucket, and so their number: `rollout.weight_sync.buckets.buckets`' rule."""
    ends, held = [], 0
    for index, size in enumerate(sizes):
        if held and held + size > limit:
            ends.append(index - 1)
            held = 0
        held += size
    return [*ends, len(sizes) - 1] if sizes else []


def sync_plan(stream: Sequence[Tensor], trainer: Trainer, *, bucket_bytes: int, transport: str) -> SyncPlan:
    """The update as `Policy.export` and `WeightSync` do it: tensor by tensor, gathered over tensor-parallel ranks, sent
    along the pipeline, and from the first rank to all servers at once (NCCL pipelines its broadcast)."""
    sizes = [tensor.numel * trainer.policy.itemsize for tensor in stream]
    ends = bucket_ends(sizes, bucket_bytes)
    starts = [0, *(end + 1 for end in ends[:-1])]
    largest = max(sum(sizes[a : b + 1]) for a, b in zip(starts, ends, strict=True))
    stages = [
        StageSync(
            stage,
            sum(tensor.stage == stage for tensor in stream),
            sum(size for size, tensor in zip(sizes, stream, strict=True) if tensor.stage == stage),
            sum(stream[end].stage == stage for end in ends),
        )
        for stage in range(trainer.parallel.pp)
    ]
    total, tp = sum(sizes), trainer.parallel.tp
    disk = trainer.assumptions.disk_gb_s * GIGA
    seconds = {
        "gather over tensor-parallel ranks": (tp - 1) / tp * total / trainer.link(tp),
        "along the pipeline": total / trainer.network if trainer.parallel.pp > 1 else 0.0,
    }
    if transport == "group":
        seconds["to the servers"] = total / trainer.network
    else:
        seconds["write the snapshot"] = total / disk
        seconds["servers read it"] = total / disk
    return SyncPlan(stages, bucket_bytes, largest, seconds)
