"""What keeps a layout from working, what does not fit, and what may disappoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import floor
from typing import Any

from ...config.checks import check
from ...config.root import Config
from ...config.servers import POLICY, PoolSection
from .crew import Crew
from .generate import Fleet
from .hardware import GIB, GPU
from .memory import RankMemory, ServerMemory
from .providers import EMBEDDED_POLICY, Answered
from .shards import PlannedPolicy
from .step import Times
from .workload import Workload


def cannot_work(config: Config, crew: Crew, gpu: GPU, hf: Mapping[str, Any]) -> Iterator[str]:
    """What cannot work whatever the memory."""
    device: Any = "cpu" if config.run.device == "cpu" else "cuda"
    yield from check(config, world_size=crew.trainers, hf_config=hf, tokenizer_size=None, device=device)
    yield from _context_parallel(config)
    if not crew.serving:
        return
    pool = config.servers.policy
    if crew.serving % pool.tp:
        yield (
            f"servers.pools.policy.tp = {pool.tp} does not divide the {crew.serving} GPUs that serve: "
            f"give them a multiple of {pool.tp}."
        )
    elif not pool.urls and crew.servers % pool.count:
        yield (
            f"servers.pools.policy.count = {pool.count} servers a host x tp = {pool.tp} take {pool.count * pool.tp} "
            f"GPUs, which does not divide the {crew.serving} that serve: make the hosts whole."
        )
    if pool.tp * (1 if pool.urls else pool.count) > gpu.per_node:
        yield (
            f"servers.pools.policy.count = {pool.count} x tp = {pool.tp} needs {pool.count * pool.tp} GPUs on one "
            f"host, which has {gpu.per_node}."
        )
    heads = int(hf["num_attention_heads"])
    if heads % pool.tp:
        yield f"servers.pools.policy.tp = {pool.tp} does not divide the {heads} attention heads of the model."


def _context_parallel(config: Config) -> Iterator[str]:
    cp, longest = config.parallel.cp, config.data.max_prompt_tokens + config.rollout.max_new_tokens - 1
    if cp > 1 and longest < 2 * cp:
        yield (
            f"parallel.cp = {cp} cuts every sequence into {2 * cp} stretches, and the longest has {longest} tokens: "
            "set parallel.cp=1."
        )


def too_big(
    config: Config,
    gpu: GPU,
    ranks: Sequence[RankMemory],
    fleet: Fleet | None,
    asked: Sequence[Answered],
    sleeping: int | None = None,
) -> Iterator[str]:
    """What does not fit, with its figures. `sleeping`: bytes that a server on the trainer's GPU keeps, where there is
    one."""
    for rank in ranks:
        if rank.peak > gpu.memory - (sleeping or 0):
            which = ", ".join(map(str, rank.shard.pp_ranks))
            beside = f" beside the {sleeping / GIB:.1f} of a sleeping server" if sleeping else ""
            yield (
                f"pipeline rank {which} needs {rank.peak / GIB:.1f} GiB of {gpu.name}'s {gpu.memory / GIB:.1f}{beside} "
                f"({rank.shard.total / GIB:.1f} stay, {rank.update / GIB:.1f} for the update): {_remedies(rank)}."
            )
    pool = config.servers.policy
    if fleet is not None and sleeping is not None and fleet.memory.other < sleeping:
        server = fleet.memory
        yield (
            f"while servers generate, {server.trainer / GIB:.1f} GiB of the trainer stay on each GPU: with "
            f"servers.pools.policy.mem_fraction = {pool.mem_fraction} that leaves {server.other / GIB:.1f} GiB for "
            f"what a server needs beside weights and cache ({sleeping / GIB:.1f}): lower it to "
            f"{_fraction(gpu, server, sleeping):.2f}."
        )
    if fleet is not None:
        context = config.data.max_prompt_tokens + config.rollout.max_new_tokens
        yield from _cache_too_small(POLICY, pool, fleet.memory, context)
    for each in asked:
        if each.fleet is not None and each.asked.pool is not None and each.asked.job is not None:
            other, job = config.servers.pools[each.asked.pool], each.asked.job
            yield from _cache_too_small(each.asked.pool, other, each.fleet.memory, int(job.prompt) + job.longest)


def _remedies(rank: RankMemory) -> str:
    means = "use more tp, pp or dp"
    if rank.shard.expert_parameters:
        means += " or ep"
    if rank.shard.optimizer and not rank.shard.offloaded:
        means += ", optim.offload=true"
    means += ", model.recompute=full, or a smaller parallel.max_tokens_per_microbatch"
    return f"{means}; parallel.cp above 1 where a single sequence is too long"


def _cache_too_small(name: str, pool: PoolSection, server: ServerMemory, context: int) -> Iterator[str]:
    if server.tokens < context:
        yield (
            f"a server's cache of servers.pools.{name} has room for {server.tokens} tokens beside "
            f"{server.weights / GIB:.1f} GiB of weights a GPU, fewer than the {context} of one response: raise "
            f"servers.pools.{name}.tp = {pool.tp} or mem_fraction = {pool.mem_fraction}."
        )


def _fraction(gpu: GPU, server: ServerMemory, sleeping: int) -> float:
    """The largest `mem_fraction` that fits, in hundredths."""
    return max(0, floor(100 * (gpu.memory - server.trainer - sleeping) / gpu.memory)) / 100


def needless(config: Config, gpu: GPU, whole: Sequence[RankMemory], sleeping: int | None = None) -> Iterator[str]:
    """Context parallelism that nothing asks for. `whole`: the ranks with whole micro-batches."""
    cp = config.parallel.cp
    if cp > 1 and all(rank.peak <= gpu.memory - (sleeping or 0) for rank in whole):
        peak = max(rank.peak for rank in whole) / GIB
        yield (
            f"parallel.cp = {cp} is not needed: whole micro-batches take {peak:.1f} GiB at the peak, and {cp} times as "
            "many replicas exchange no keys and values."
        )


def notes(config: Config, gpu: GPU, policy: PlannedPolicy, work: Workload, times: Times) -> Iterator[str]:
    """What works and may disappoint."""
    parallel = config.parallel
    if parallel.tp > gpu.per_node:
        yield f"parallel.tp = {parallel.tp} is beyond a node of {gpu.per_node} GPUs: its all-reduces use the network."
    elif parallel.tp * parallel.cp > gpu.per_node and parallel.cp > 1:
        yield (
            f"parallel.tp = {parallel.tp} x parallel.cp = {parallel.cp} is beyond a node of {gpu.per_node} GPUs: keys "
            "and values of every layer use the network."
        )
    if parallel.tp <= gpu.per_node < parallel.tp * parallel.ep:
        yield (
            f"parallel.tp = {parallel.tp} x parallel.ep = {parallel.ep} is beyond a node of {gpu.per_node} GPUs: "
            "tokens reach their experts over the network."
        )
    if policy.mixture.experts:
        yield _tokens_of_an_expert(policy, work, times)
    if work.longest_row > parallel.max_tokens_per_microbatch:
        yield (
            f"parallel.max_tokens_per_microbatch = {parallel.max_tokens_per_microbatch} is less than the longest "
            f"prompt and response, {work.longest_row}: such rows are micro-batches alone; memory is planned for them."
        )
    if work.updates and times.bubble > 0.3:
        yield (
            f"the pipeline idles {times.bubble:.0%} of an update: {times.microbatches} micro-batches for "
            f"{parallel.pp} stages. A smaller parallel.max_tokens_per_microbatch, fewer stages or vpp help."
        )
    if config.rollout.engine == "embedded":
        more = {each.asked.who for each in times.asked if each.asked.who and each.asked.pool is None}
        copies = 1 + len(more - {EMBEDDED_POLICY})
        yield (
            f"the embedded engine keeps {copies} more cop{'y' if copies == 1 else 'ies'} of the whole model on every "
            "replica's first rank, which the table does not count, and its time is not modelled."
        )
    for each in times.asked:
        if each.seconds is None:
            yield f"what reward.providers.{each.asked.label} asks {each.asked.who} is not in the total."
    if config.servers.colocated:
        yield (
            "trainer and servers take turns on the same GPUs: weights and optimizer of the trainer stay there while "
            "servers generate; handing the memory over, twice a step, takes time that is not in the total."
        )


def _tokens_of_an_expert(policy: PlannedPolicy, work: Workload, times: Times) -> str:
    """How small the experts' products are."""
    mixture, parallel = policy.mixture, policy.parallel
    replicas = work.trained_rows[0].count / policy.dp * work.epochs / max(1, work.updates)
    tokens = replicas * work.trained_rows[0].length / times.microbatches / parallel.cp * parallel.ep
    return (
        f"an expert is given about {tokens * mixture.chosen / mixture.experts:,.0f} tokens of a micro-batch, one "
        "expert after the other: products of few rows reach less than compute_efficiency."
    )
