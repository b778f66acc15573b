"""From a config, a kind of GPU and their number to a plan, with everything that keeps it from working."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...config.root import Config
from ...exit_codes import UnusableInput
from ...policy.hf.families import Family, family_of
from ...policy.hf.folder import read_config
from .crew import Crew
from .generate import Fleet, Job, fleet_of, generation
from .hardware import GIB, GPU, Assumptions
from .memory import Load, RankMemory, ServerMemory, rank_memory
from .providers import answered, asked_of
from .shards import PlannedPolicy, Shard, build_shards, estimated_shards
from .speed import Trainer
from .step import Times, step_times
from .sync import SyncPlan, sync_plan
from .verdict import cannot_work, needless, notes, too_big
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
    fleet: Fleet | None
    """The policy's servers."""
    host_bytes: int
    """Host memory of one rank for the reference and the moving average."""
    times: Times
    sync: SyncPlan | None
    work: Workload
    problems: list[str]
    notes: list[str]

    @property
    def server(self) -> ServerMemory | None:
        """One GPU of the policy's servers."""
        return None if self.fleet is None else self.fleet.memory

    @property
    def active(self) -> int:
        """Parameters that a token meets."""
        return self.parameters - self.policy.mixture.idle_parameters

    @property
    def gpu_hours(self) -> float:
        """Of one step: all GPUs, at work or not; those of other pools aside."""
        return self.times.total * self.crew.gpus / 3600


@dataclass(frozen=True)
class Model:
    """The model that is planned for."""

    hf: Mapping[str, Any]
    family: Family


def load_model(config: Config) -> Model:
    """config.json of `model.path`. UnusableInput for what cannot be planned."""
    hf = read_config(config.model.path)
    return Model(hf, family_of(hf, config.model.path))


def make_plan(
    config: Config, model: Model, gpu: GPU, crew: Crew, assumptions: Assumptions, *, built: bool = True
) -> Plan:
    """A plan with every problem listed; UnplannableError for a layout that cannot work at all. `built`: ranks are built
    and counted; without, their bytes are estimated."""
    if problems := [*cannot_work(config, crew, gpu, model.hf)]:
        raise UnplannableError(problems)
    policy = _planned_policy(config, model, crew, assumptions)
    shards = build_shards(policy) if built else estimated_shards(policy)
    parameters = policy.stream.numel
    asked = asked_of(config, assumptions)
    work = workload_of(config, assumptions, [each.lessons for each in asked if each.lessons is not None])
    trainer = Trainer(policy, gpu, assumptions)
    fleet = sync = generate = None
    if crew.serving:
        pool, reserve = config.servers.policy, int(assumptions.trainer_reserve_gib * GIB)
        stays = max(shard.beside_servers for shard in shards) + reserve if crew.shared else 0
        fleet = fleet_of(
            model.hf, pool, gpu,
            servers=crew.servers, parameters=parameters, itemsize=policy.itemsize, trainer=stays,
        )  # fmt: skip
        sync = sync_plan(trainer, bucket_bytes=config.servers.bucket_mb << 20, transport=config.servers.transport)
        job = Job(config.rollout.sampled, work.votes, work.prompt, work.response, work.longest_response)
        generate = generation(fleet, job, gpu, assumptions)
    times = step_times(
        trainer,
        work,
        shards,
        generate=generate,
        asked=[answered(each, config, fleet, gpu, assumptions) for each in asked],
        sync=sync,
        overlapped=config.rollout.max_staleness > 0,
    )
    load = _load(config, work, times, assumptions)
    ranks = [rank_memory(shard, policy, load) for shard in shards]
    sleeping = int(assumptions.sleeping_server_gib * GIB) if crew.shared else None
    whole = _with_whole_rows(policy, ranks, load) if policy.parallel.cp > 1 else []
    return Plan(
        config=config,
        policy=policy,
        gpu=gpu,
        crew=crew,
        assumptions=assumptions,
        parameters=parameters,
        tokens=load.tokens,
        ranks=ranks,
        fleet=fleet,
        host_bytes=max(_in_host_memory(shard, config, policy) for shard in shards),
        times=times,
        sync=sync,
        work=work,
        problems=[*too_big(config, gpu, ranks, fleet, times.asked, sleeping)],
        notes=[*notes(config, gpu, policy, work, times), *needless(config, gpu, whole, sleeping)],
    )


def _with_whole_rows(policy: PlannedPolicy, ranks: Sequence[RankMemory], load: Load) -> list[RankMemory]:
    """The ranks without context parallelism, as data-parallel ones that get a whole micro-batch each."""
    plain = replace(policy, parallel=policy.parallel.model_copy(update={"cp": 1}), dp=policy.replicas)
    return [rank_memory(rank.shard, plain, load) for rank in ranks]


def _planned_policy(config: Config, model: Model, crew: Crew, assumptions: Assumptions) -> PlannedPolicy:
    parallel = config.parallel
    return PlannedPolicy(
        hf=model.hf,
        family=model.family,
        parallel=parallel,
        dp=crew.trainers // parallel.model_ranks,
        dtype=_dtype(config),
        recompute=config.model.recompute,
        optim=None if config.run.rollout_only else config.optim,
        expert_imbalance=assumptions.expert_imbalance,
    )


def _load(config: Config, work: Workload, times: Times, assumptions: Assumptions) -> Load:
    """The largest micro-batch is as long as the budget, or as the longest row where that is longer, and is padded: by
    tp, and with cp to 2 x cp stretches, of which each rank has an early and a late one."""
    tokens = max(config.parallel.max_tokens_per_microbatch, work.longest_row)
    parallel = config.parallel
    return Load(
        tokens=tokens + -tokens % (parallel.tp * (2 * parallel.cp if parallel.cp > 1 else 1)),
        microbatches=times.microbatches,
        swaps=config.keeps_start or config.algorithm.kl.coef > 0 or config.reward.judge == "ema",
        bucket_bytes=config.servers.bucket_mb << 20,
        reserve=int(assumptions.trainer_reserve_gib * GIB),
    )


def _in_host_memory(shard: Shard, config: Config, policy: PlannedPolicy) -> int:
    """Bytes of a rank there: the reference, float32; its part of the moving average, as of the masters; and of the
    optimizer, where it is offloaded."""
    reference = 4 * shard.parameters if config.keeps_start else 0
    if config.optim.ema_decay is None:
        average = 0.0
    elif config.parallel.distributed_optimizer:
        experts = shard.expert_parameters
        average = 4 * ((shard.parameters - experts) / policy.replicas + experts / policy.expert_replicas)
    else:
        average = 4.0 * shard.parameters
    return reference + int(average) + shard.visiting


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
