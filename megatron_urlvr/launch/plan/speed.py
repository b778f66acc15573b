"""Seconds of a step from FLOPs, bytes and the stated figures. A model, not a measurement: see `Assumptions`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...config.parallel import ParallelSection
from ...policy.hf.families import shape_of
from .hardware import GPU, Assumptions
from .memory import ServerMemory
from .shards import PlannedPolicy, Shard, layers_of_stages
from .workload import Workload, microbatches

GIGA = 1e9
TERA = 1e12


@dataclass(frozen=True)
class Pass:
    """FLOPs of one forward of one token, split by where it runs."""

    layer: float
    """Matrix products of one layer."""
    attention: float
    """Of one layer, at the mean context of a row."""
    head: float
    """For a response token."""


def forward_flops(hf: Mapping[str, Any], row: float) -> Pass:
    """Two operations for each weight of a matrix; attention reads half of a row on average (causal)."""
    shape = shape_of(hf, tp=1)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = shape.hidden * (2 * q + 2 * kv) + 3 * shape.hidden * shape.ffn
    return Pass(2 * weights, 2 * 2 * q * row / 2, 2 * shape.hidden * shape.vocab_size)


@dataclass(frozen=True)
class Trainer:
    """The trainer's part of the model of time."""

    policy: PlannedPolicy
    gpu: GPU
    assumptions: Assumptions

    @property
    def parallel(self) -> ParallelSection:
        """The policy's layout."""
        return self.policy.parallel

    @property
    def rate(self) -> float:
        """FLOPs a second of one GPU, as assumed."""
        return self.gpu.tflops * TERA * self.assumptions.compute_efficiency

    def link(self, ranks: int) -> float:
        """Bytes a second between `ranks` neighbouring ranks: NVLink inside a node, the network beyond."""
        rate = self.gpu.nvlink_gb_s if ranks <= self.gpu.per_node else self.gpu.network_gb_s
        return rate * GIGA * self.assumptions.link_efficiency

    @property
    def network(self) -> float:
        """Bytes a second between nodes."""
        return self.gpu.network_gb_s * GIGA * self.assumptions.link_efficiency

    def bubble(self, count: int) -> float:
        """Share of a pass that a pipeline rank idles: (pp - 1) / vpp of (count + (pp - 1) / vpp) micro-batches' time
        (Narayanan et al., arXiv 2104.04473, sections 2.2.1 and 2.2.2)."""
        idle = (self.parallel.pp - 1) / self.parallel.vpp
        return idle / (count + idle)

    def microbatch(self, tokens: float, responses: float, row: float, *, training: bool) -> float:
        """Seconds that the slowest pipeline rank takes for one micro-batch."""
        flops, tp = forward_flops(self.policy.hf, row), self.parallel.tp
        layers = layers_of_stages(self.parallel, self.policy.layers)
        again = {"none": 0.0, "selective": 0.0, "full": 1.0}[self.policy.recompute]
        attention_again = 0.0 if self.policy.recompute == "none" else 1.0
        passes = 3.0 + again if training else 1.0
        attention_passes = 3.0 + attention_again if training else 1.0
        layer = tokens * (flops.layer * passes + flops.attention * attention_passes) / tp / self.rate
        # Forward and backward all-reduce twice a layer; for dW, sequence parallelism gathers both inputs again.
        reduces = 2.0 * (2 + again if training else 1)
        if training and self.parallel.sequence_parallel:
            reduces += 1.0
        size = tokens * int(self.policy.hf["hidden_size"]) * self.policy.itemsize
        layer += reduces * 2 * (tp - 1) / tp * size / self.link(tp)
        head = responses * flops.head * (3.0 if training else 1.0) / tp / self.rate
        hop = 0.0
        if self.parallel.pp > 1:
            hop = size / self.policy.sharded_by_sequence / self.network * self.parallel.vpp * (2 if training else 1)
        return hop + max([layer * count for count in layers[:-1]] + [layer * layers[-1] + head])

    def passes(self, rows: float, work: Workload, *, training: bool) -> tuple[float, int]:
        """(seconds, micro-batches) of `rows` rows of one replica through the pipeline."""
        count = microbatches(rows, work.row, self.parallel.max_tokens_per_microbatch)
        if training and self.parallel.vpp > 1:
            count += -count % self.parallel.pp
        share = rows / count
        one = self.microbatch(share * work.row, share * work.response, work.row, training=training)
        return one * (count + (self.parallel.pp - 1) / self.parallel.vpp), count

    def after_backward(self, shard: Shard) -> dict[str, float]:
        """Seconds of the gradients' reduction, the optimizer and the gathering of new weights, none of it hidden."""
        sharded, dp = self.parallel.distributed_optimizer, self.policy.dp
        ranks = self.parallel.tp * dp
        reduce = (1 if sharded else 2) * (dp - 1) / dp * shard.gradients / self.link(ranks)
        gather = (dp - 1) / dp * shard.weights / self.link(ranks) if sharded else 0.0
        touched = shard.weights + 2 * shard.optimizer + shard.gradients / (dp if sharded else 1)
        adam = touched / (self.gpu.memory_gb_s * GIGA * self.assumptions.memory_efficiency)
        return {"reduce gradients": reduce, "optimizer": adam, "gather weights": gather}


@dataclass(frozen=True)
class Generation:
    """What the rollout servers do in a step."""

    servers: int
    running: int
    """Responses that one server decodes at once, at most."""
    seconds: float
    tokens_per_second: float
    """Of one GPU."""


def generation(
    memory: ServerMemory,
    work: Workload,
    gpu: GPU,
    assumptions: Assumptions,
    *,
    servers: int,
    tp: int,
    concurrency: int,
    parameters: int,
    prompts: int,
) -> Generation:
    """Seconds until the last response of a step is there.

    A decode step reads all weights and the cache of every running response, or computes them, whichever is slower.
    Response lengths are even between twice the mean less the longest, and the longest. Prompts are computed once.
    """
    each = work.votes / servers
    room = memory.tokens / (work.prompt + work.longest_response / 2)
    running = max(1, min(concurrency, int(room), round(each)))
    rate = gpu.tflops * TERA * assumptions.compute_efficiency
    bandwidth = gpu.memory_gb_s * GIGA * assumptions.memory_efficiency

    def step(alive: float, context: float) -> float:
        read = (memory.weights + alive * context * memory.kv_token) / bandwidth
        compute = alive * 2 * parameters / tp / rate
        return max(read, compute) + assumptions.decode_step_ms / 1000

    longest, mean = work.longest_response, work.response
    shortest = 2 * mean - longest
    waiting = max(0.0, each - running) * mean / running  # decode steps with every place taken
    seconds = waiting * step(running, work.prompt + mean / 2)
    parts = 64
    for part in range(parts):
        position = (part + 0.5) * longest / parts
        left = 1.0 if position < shortest else (longest - position) / (longest - shortest)
        seconds += longest / parts * step(max(1.0, running * left), work.prompt + position)
    seconds += prompts / servers * work.prompt * 2 * parameters / tp / rate
    return Generation(servers, running, seconds, work.votes * mean / seconds / (servers * tp))
