"""Seconds until servers have generated what they are asked for. A model, not a measurement: see `Assumptions`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...config.servers import PoolSection
from .hardware import GPU, Assumptions
from .memory import ServerMemory, server_memory
from .mixture import Mixture, mixture_of
from .speed import GIGA, TERA

PARTS = 64
"""Stretches of the longest response, over each of which the number of running ones is held."""


@dataclass(frozen=True)
class Fleet:
    """Servers of one model."""

    memory: ServerMemory
    servers: int
    tp: int
    concurrency: int
    parameters: int
    """Of the model."""
    mixture: Mixture

    @property
    def active(self) -> int:
        """Parameters that a token meets."""
        return self.parameters - self.mixture.idle_parameters


def fleet_of(
    hf: Mapping[str, Any],
    pool: PoolSection,
    gpu: GPU,
    *,
    servers: int,
    parameters: int,
    itemsize: int,
    trainer: int = 0,
) -> Fleet:
    """`servers` servers of `pool`, which hold the model of `hf`; see `server_memory`."""
    memory = server_memory(hf, pool, gpu, parameters=parameters, itemsize=itemsize, trainer=trainer)
    return Fleet(memory, servers, pool.tp, pool.concurrency, parameters, mixture_of(hf))


@dataclass(frozen=True)
class Job:
    """What servers are asked for; lengths are means."""

    prompts: float
    responses: float
    """To all prompts."""
    prompt: float
    response: float
    longest: int
    """Of the responses."""


@dataclass(frozen=True)
class Generation:
    """What rollout servers do in a step."""

    servers: int
    running: int
    """Responses that one server decodes at once, at most."""
    seconds: float
    tokens_per_second: float
    """Of one GPU."""


def generation(fleet: Fleet, job: Job, gpu: GPU, assumptions: Assumptions) -> Generation | None:
    """Seconds until the last response is there; None when the servers' cache holds nothing.

    A decode step reads all weights that its tokens meet and the cache of every running response, or computes them,
    whichever is slower. Response lengths are even between twice the mean less the longest, and the longest. Prompts are
    computed once.
    """
    memory, tp = fleet.memory, fleet.tp
    if memory.tokens <= 0:
        return None
    each = job.responses / fleet.servers
    room = memory.tokens / (job.prompt + job.longest / 2)
    running = max(1, min(fleet.concurrency, int(room), round(each)))
    rate = gpu.tflops * TERA * assumptions.compute_efficiency
    bandwidth = gpu.memory_gb_s * GIGA * assumptions.memory_efficiency

    def step(alive: float, context: float) -> float:
        weights = memory.weights - (1 - fleet.mixture.touched(alive)) * memory.experts
        read = (weights + alive * context * memory.kv_token) / bandwidth
        compute = alive * 2 * fleet.active / tp / rate
        return max(read, compute) + assumptions.decode_step_ms / 1000

    longest, mean = job.longest, job.response
    shortest = 2 * mean - longest
    waiting = max(0.0, each - running) * mean / running  # decode steps with every place taken
    seconds = waiting * step(running, job.prompt + mean / 2)
    for part in range(PARTS):
        position = (part + 0.5) * longest / PARTS
        left = 1.0 if position < shortest else (longest - position) / (longest - shortest)
        seconds += longest / PARTS * step(max(1.0, running * left), job.prompt + position)
    seconds += job.prompts / fleet.servers * job.prompt * 2 * fleet.active / tp / rate
    return Generation(fleet.servers, running, seconds, job.responses * mean / seconds / (fleet.servers * tp))
