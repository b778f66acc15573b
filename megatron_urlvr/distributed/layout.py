"""The parallel layout: process groups of one trainer, and this rank's place in them."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..config.parallel import ParallelSection
from ..exit_codes import UnusableInput
from ..policy import cpu
from .ranks import meet, must_meet

CONTROL_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class Layout:
    """Sizes and ranks of this process, and the gloo groups that ranks meet on outside the model.

    A *replica* is the set of tp x pp x cp ranks that work on the same rows; each of its cp ranks has a copy of the
    policy. Its *leader* (tp and cp rank 0 of the first pipeline stage) speaks with engines.
    """

    device: torch.device
    world_size: int
    rank: int
    tp: int
    tp_rank: int
    pp: int
    pp_rank: int
    cp: int
    cp_rank: int
    ep: int
    ep_rank: int
    dp: int
    dp_rank: int
    control: Any
    """gloo group of all ranks."""
    replica: Any
    """gloo group of this replica's ranks."""
    replica_ranks: tuple[int, ...]
    """Global ranks of this replica."""
    leaders: tuple[int, ...]
    """Global ranks of all replicas' leaders, by dp rank."""
    pipeline: Any
    """Group of this rank's pipeline (one rank a stage); the backend of the model."""
    pipeline_ranks: tuple[int, ...]
    tensor: Any
    """Tensor-parallel group."""
    context: Any
    """Context-parallel group: the ranks that hold the other tokens of this one's sequences."""
    experts: Any
    """Expert-parallel group: the ranks that hold the other experts of this one's layers."""
    peers: Any
    """gloo group of the ranks in this one's place of every replica, by dp rank."""

    @property
    def is_leader(self) -> bool:
        """First rank of its replica."""
        return self.rank == self.replica_ranks[0]

    @property
    def is_main(self) -> bool:
        """Global rank 0, the control plane."""
        return self.rank == 0

    @property
    def last_stage_rank(self) -> int:
        """Global rank, in this replica and tensor-parallel position, of the last pipeline stage."""
        return self.pipeline_ranks[-1]


def world_size_from_environment() -> int:
    """World size as torchrun announces it, or srun (`ranks.adopt_srun`); 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def pick_device(wanted: str) -> torch.device:
    """`auto` is CUDA when a device is there. UnusableInput when the wanted one cannot be had."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UnusableInput("run.device = cuda, but torch sees no CUDA device; allowed here: auto, cpu")
    if wanted == "cpu" and torch.cuda.is_available():
        raise UnusableInput("run.device = cpu, but this machine has CUDA: hide it with CUDA_VISIBLE_DEVICES= first")
    if torch.cuda.is_available():
        # srun may have bound one device to each task, which then sees no other.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def start(
    parallel: ParallelSection, *, device: str = "auto", seed: int = 0, run_dir: str | Path | None = None
) -> Layout:
    """Join the process group, set up Megatron's groups and seed the model-parallel random tracker.

    `run_dir`: where ranks that srun started find each other; torchrun's need none.
    May be called again in one process with other sizes (tests do); the groups are rebuilt.
    """
    cpu.install()
    from megatron.core import parallel_state as mpu
    from megatron.core import tensor_parallel

    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        if run_dir is not None and must_meet(os.environ):
            rank, world = int(os.environ["RANK"]), world_size_from_environment()
            dist.init_process_group(backend, store=meet(Path(run_dir) / "rendezvous"), rank=rank, world_size=world)
        elif world_size_from_environment() > 1:
            dist.init_process_group(backend)
        else:  # alone: no port that another run on this machine might take, nothing left in the environment
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mpu.destroy_model_parallel()
    form_groups(parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return _describe(mpu, chosen)


def form_groups(parallel: ParallelSection) -> None:
    """Megatron's process groups of a layout; data-parallel replicas are what the world has beyond `model_ranks`."""
    from megatron.core import parallel_state as mpu

    mpu.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
    )


@contextmanager
def joined(
    parallel: ParallelSection, *, device: str = "auto", seed: int = 0, run_dir: str | Path | None = None
) -> Iterator[Layout]:
    """`start` for the time of a block, and leave the groups (their threads and connections) at its end.

    After an error they are left to the end of the process where there are several: other ranks may never come.
    """
    layout = start(parallel, device=device, seed=seed, run_dir=run_dir)
    alike = layout.world_size == 1
    try:
        yield layout
        alike = True
    finally:
        if alike:
            stop()


def stop() -> None:
    """Leave all process groups. `start` may be called again."""
    from megatron.core import parallel_state as mpu

    mpu.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _describe(mpu: Any, device: torch.device) -> Layout:
    world, rank = dist.get_world_size(), dist.get_rank()
    tp, pp = mpu.get_tensor_model_parallel_world_size(), mpu.get_pipeline_model_parallel_world_size()
    dp = mpu.get_data_parallel_world_size()
    ranks = (
        mpu.get_data_parallel_rank(),
        mpu.get_pipeline_model_parallel_rank(),
        mpu.get_context_parallel_rank(),
        mpu.get_tensor_model_parallel_rank(),
    )
    place = tuple(int(each) for each in ranks)
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    table = torch.zeros(world, len(place), dtype=torch.int64)
    table[rank] = torch.tensor(place)
    dist.all_reduce(table, group=control)
    places = [tuple(row) for row in table.tolist()]
    replica_of = [tuple(sorted((r for r in range(world) if places[r][0] == d), key=lambda r: places[r][1:]))
                  for d in range(dp)]  # fmt: skip
    # Every rank takes part in the creation of every group, in the same order.
    groups = [dist.new_group(list(ranks), backend="gloo", timeout=CONTROL_TIMEOUT) for ranks in replica_of]
    return Layout(
        device=device,
        world_size=world,
        rank=rank,
        tp=tp,
        tp_rank=place[3],
        pp=pp,
        pp_rank=place[1],
        cp=mpu.get_context_parallel_world_size(),
        cp_rank=place[2],
        ep=mpu.get_expert_model_parallel_world_size(),
        ep_rank=mpu.get_expert_model_parallel_rank(),
        dp=dp,
        dp_rank=place[0],
        control=control,
        replica=groups[place[0]],
        replica_ranks=replica_of[place[0]],
        leaders=tuple(ranks[0] for ranks in replica_of),
        pipeline=mpu.get_pipeline_model_parallel_group(),
        pipeline_ranks=tuple(dist.get_process_group_ranks(mpu.get_pipeline_model_parallel_group())),
        tensor=mpu.get_tensor_model_parallel_group(),
        context=mpu.get_context_parallel_group(),
        experts=mpu.get_expert_model_parallel_group(),
        peers=mpu.get_data_parallel_group_gloo(),
    )


def broadcast_json(value: Any, *, source: int, group: Any) -> Any:
    """Hand a JSON-able value from global rank `source` to all of `group` (gloo); returns it on every rank."""
    mine = dist.get_rank() == source
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) if mine else None
    length = torch.tensor([0 if payload is None else len(payload)])
    dist.broadcast(length, source, group=group)
    if payload is None:
        payload = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(payload, source, group=group)
    return value if mine else json.loads(payload.numpy().tobytes())


def gather_json(value: Any, group: Any) -> list[Any]:
    """Every rank's JSON-able value, in rank order, on every rank of `group` (gloo)."""
    size = dist.get_world_size(group)
    if size == 1:
        return [value]
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(payload)]), group=group)
    longest = int(max(lengths))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(payload)] = payload
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(size)]
    dist.all_gather(parts, padded, group=group)
    return [json.loads(part[: int(n)].numpy().tobytes()) for part, n in zip(parts, lengths, strict=True)]
