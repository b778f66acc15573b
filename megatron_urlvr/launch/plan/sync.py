"""How the weights travel to the servers: buckets of each pipeline stage, bytes and seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from .speed import GIGA, Trainer
from .stream import Stream


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


@cache
def _buckets(stream: Stream, limit: int, itemsize: int) -> tuple[Counter[int], int]:
    """Buckets that end in each stage, and bytes of the largest."""
    sizes = [tensor.numel * itemsize for tensor in stream.tensors]
    ends = bucket_ends(sizes, limit)
    starts = [0, *(end + 1 for end in ends[:-1])]
    largest = max(sum(sizes[a : b + 1]) for a, b in zip(starts, ends, strict=True))
    return Counter(stream.tensors[end].stage for end in ends), largest


def sync_plan(trainer: Trainer, *, bucket_bytes: int, transport: str) -> SyncPlan:
    """The update as `Policy.export` and `WeightSync` do it: tensor by tensor, gathered over tensor- and expert-parallel
    ranks, sent along the pipeline, and from the first rank to all servers at once (NCCL pipelines its broadcast)."""
    stream, itemsize = trainer.policy.stream, trainer.policy.itemsize
    buckets, largest = _buckets(stream, bucket_bytes, itemsize)
    stages = [
        StageSync(rank, stage.tensors, stage.numel * itemsize, buckets[rank])
        for rank, stage in enumerate(stream.stages)
    ]
    total, tp, ep = stream.numel * itemsize, trainer.parallel.tp, trainer.parallel.ep
    disk = trainer.assumptions.disk_gb_s * GIGA
    seconds = {
        "gather over tensor-parallel ranks": (tp - 1) / tp * total / trainer.link(tp),
        "gather experts": (ep - 1) / ep * stream.experts * itemsize / trainer.link(tp * ep),
        "along the pipeline": total / trainer.network if trainer.parallel.pp > 1 else 0.0,
    }
    if transport == "group":
        seconds["to the servers"] = total / trainer.network
    else:
        seconds["write the snapshot"] = total / disk
        seconds["servers read it"] = total / disk
    return SyncPlan(stages, bucket_bytes, largest, seconds)
