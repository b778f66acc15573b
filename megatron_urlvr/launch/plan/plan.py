"""From a config, a kind of GPU and their number to a plan, with everything that keeps it from working."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...config.root import Config
from ...exit_codes import UnusableInput
from ...policy.hf.families import Family, family_of
from ...policy.hf.folder import read_config
from .crew import Crew
from .hardware import GIB, GPU, Assumptions
from .memory import Load, RankMemory, ServerMemory, rank_memory, server_memory
from .shards import PlannedPolicy, build_shards, estimated_shards, stream_of
from .speed import Trainer
from .step import Times, generation_of, step_times
from .sync import SyncPlan, sync_plan
from .verdict import cannot_work, notes, too_big
from .workload import Workload, workload_of


@dataclass(frozen=True)
class Plan:
    """All that `urlvr plan` has to say."""

    config: Config
    policy: PlannedPolicy
    gpu: GPU
    crew: Crew
    assumptions: Assumptions
    parameters: int
    """Of the model, as its Hugging Face tensors count."""
    tokens: int
    """Of the largest micro-batch that memory is planned for."""
    ranks: list[RankMemory]
    server: ServerMemory | None
    host_bytes: int
    """Host memory of one rank for the reference and the moving average."""
    times: Times
    sync: SyncPlan | None
    work: Workload
    problems: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Model:
    """The model that is planned for."""

    hf: Mapping[str, Any]
    family: Family


def load_model(config: Config) -> Model:
    """config.json of `model.path`. UnusableInput for what cannot be planned."""
    hf = read_config(config.model.path)
    family = family_of(hf, config.model.path)
    if "num_experts" in hf or "moe_intermediate_size" in hf:
        raise UnusableInput(
            f"model.path = {config.model.path}: mixtures of experts cannot be planned: how many tokens an"
            " expert gets is not known beforehand"
        )
    return Model(hf, family)


def make_plan(
    config: Config, model: Model, gpu: GPU, crew: Crew, assumptions: Assumptions, *, built: bool = True
) -> Plan:
    """A plan with every problem listed; UnplannableError for a layout that cannot work at all. `built`: ranks are built
    and counted; without, their bytes are estimated."""
    if problems := [*cannot_work(config, crew, gpu, model.hf)]:
        raise UnplannableError(problems)
    policy = _planned_policy(config, model, crew)
    shards = build_shards(policy) if built else estimated_shards(policy)
    stream = stream_of(policy)
    parameters = sum(tensor.numel for tensor in stream)
    work = workload_of(config, assumptions)
    trainer = Trainer(policy, gpu, assumptions)
    server = sync = generate = None
    if crew.serving:
        pool, reserve = config.servers.policy, int(assumptions.trainer_reserve_gib * GIB)
        stays = max(shard.total for shard in shards) + reserve if crew.shared else 0
        server = server_memory(model.hf, pool, gpu, parameters=parameters, itemsize=policy.itemsize, trainer=stays)
        sync = sync_plan(
            stream, trainer, bucket_bytes=config.servers.bucket_mb << 20, transport=config.servers.transport
        )
        generate = generation_of(config, crew, server, trainer, work, parameters)
    overlapped = config.rollout.max_staleness > 0
    times = step_times(trainer, work, shards, generate=generate, sync=sync, overlapped=overlapped)
    load = _load(config, work, times, assumptions)
    ranks = [rank_memory(shard, policy, load, stream) for shard in shards]
    sleeping = int(assumptions.sleeping_server_gib * GIB)
    return Plan(
        config=config,
        policy=policy,
        gpu=gpu,
        crew=crew,
        assumptions=assumptions,
        parameters=parameters,
        tokens=load.tokens,
        ranks=ranks,
        server=server,
        host_bytes=_copies(config) * 4 * max(shard.parameters for shard in shards),
        times=times,
        sync=sync,
        work=work,
        problems=[*too_big(config, gpu, ranks, server, sleeping if crew.shared else None)],
        notes=[*notes(config, gpu, work, times)],
    )


def _planned_policy(config: Config, model: Model, crew: Crew) -> PlannedPolicy:
    parallel = config.parallel
    return PlannedPolicy(
        hf=model.hf,
        family=model.family,
        parallel=parallel,
        dp=crew.trainers // (parallel.tp * parallel.pp),
        dtype=_dtype(config),
        recompute=config.model.recompute,
        optim=None if config.run.rollout_only else config.optim,
    )


def _load(config: Config, work: Workload, times: Times, assumptions: Assumptions) -> Load:
    """The largest micro-batch is as long as the budget, or as the longest row where that is longer."""
    tokens = max(config.parallel.max_tokens_per_microbatch, work.longest_row)
    return Load(
        tokens=tokens + -tokens % config.parallel.tp,
        microbatches=times.microbatches,
        swaps=config.keeps_start or config.algorithm.kl.coef > 0 or config.reward.judge == "ema",
        bucket_bytes=config.servers.bucket_mb << 20,
        reserve=int(assumptions.trainer_reserve_gib * GIB),
    )


def _copies(config: Config) -> int:
    """Float32 copies of the weights in host memory."""
    return int(config.keeps_start) + int(config.optim.ema_decay is not None)


class UnplannableError(UnusableInput):
    """The layout cannot work at all; `problems` says why."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(["This layout cannot work:", *(f"  - {problem}" for problem in problems)]))
        self.problems = list(problems)


def _dtype(config: Config) -> torch.dtype:
    """What `model.dtype` means on the planned device."""
    if config.model.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.model.dtype)
        return dtype
    return torch.float32 if config.run.device == "cpu" else torch.bfloat16
