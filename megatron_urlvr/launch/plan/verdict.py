"""What keeps a layout from working, what does not fit, and what may disappoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import floor
from typing import Any

from ...config.checks import check
from ...config.root import Config
from .crew import Crew
from .hardware import GIB, GPU
from .memory import RankMemory, ServerMemory
from .step import Times
from .workload import Workload


def cannot_work(config: Config, crew: Crew, gpu: GPU, hf: Mapping[str, Any]) -> Iterator[str]:
    """What cannot work whatever the memory."""
    device: Any = "cpu" if config.run.device == "cpu" else "cuda"
    yield from check(config, world_size=crew.trainers, hf_config=hf, tokenizer_size=None, device=device)
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


def too_big(
    config: Config, gpu: GPU, ranks: Sequence[RankMemory], server: ServerMemory | None, sleeping: int | None = None
) -> Iterator[str]:
    """What does not fit, with its figures. `sleeping`: bytes that a server on the trainer's GPU keeps, where there is
    one."""
    for rank in ranks:
        if rank.peak > gpu.memory - (sleeping or 0):
            which = ", ".join(map(str, rank.shard.pp_ranks))
            beside = f" beside the {sleeping / GIB:.1f} of a sleeping server" if sleeping else ""
            yield (
                f"pipeline rank {which} needs {rank.peak / GIB:.1f} GiB of {gpu.name}'s {gpu.memory / GIB:.1f}{beside} "
                f"({rank.shard.total / GIB:.1f} stay, {rank.update / GIB:.1f} for the update): use more tp, pp or dp, "
                "model.recompute=full, or a smaller parallel.max_tokens_per_microbatch."
            )
    if server is None:
        return
    if sleeping is not None and server.other < sleeping:
        yield (
            f"while servers generate, {server.trainer / GIB:.1f} GiB of the trainer stay on each GPU: with "
            f"servers.pools.policy.mem_fraction = {config.servers.policy.mem_fraction} that leaves "
            f"{server.other / GIB:.1f} GiB for what a server needs beside weights and cache "
            f"({sleeping / GIB:.1f}): lower it to {_fraction(gpu, server, sleeping):.2f}."
        )
    pool, context = config.servers.policy, config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if server.tokens < context:
        yield (
            f"a server's cache has room for {server.tokens} tokens beside {server.weights / GIB:.1f} GiB of weights a "
            f"GPU, fewer than the {context} of one response: raise servers.pools.policy.tp = {pool.tp} or "
            f"mem_fraction = {pool.mem_fraction}."
        )


def _fraction(gpu: GPU, server: ServerMemory, sleeping: int) -> float:
    """The largest `mem_fraction` that fits, in hundredths."""
    return max(0, floor(100 * (gpu.memory - server.trainer - sleeping) / gpu.memory)) / 100


def notes(config: Config, gpu: GPU, work: Workload, times: Times) -> Iterator[str]:
    """What works and may disappoint."""
    parallel = config.parallel
    if parallel.tp > gpu.per_node:
        yield f"parallel.tp = {parallel.tp} is beyond a node of {gpu.per_node} GPUs: its all-reduces use the network."
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
        yield (
            "the embedded engine keeps a second copy of the whole model on every replica's first rank, which is not in "
            "the table, and its time is not modelled."
        )
    if config.servers.colocated:
        yield (
            "trainer and servers take turns on the same GPUs: weights, gradients and optimizer of the trainer stay "
            "there while servers generate; handing the memory over, twice a step, takes time that is not in the total."
        )
