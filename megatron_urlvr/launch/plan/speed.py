"""Seconds of a step from FLOPs, bytes and the stated figures. A model, not a measurement: see `Assumptions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...config.parallel import ParallelSection
from ...policy.hf.families import shape_of
from .hardware import GPU, Assumptions
from .mixture import mixture_of
from .shards import PlannedPolicy, Shard, layers_of_stages
from .workload import Rows, microbatches

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
    """Two operations for each weight of a matrix that a token meets; attention reads half of a row on average
    (causal)."""
    shape = shape_of(hf, tp=1)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    mlp = 3 * shape.hidden * shape.ffn
    if shape.experts:
        mixture = mixture_of(hf)
        mlp = mixture.chosen * mixture.expert_weights + shape.hidden * shape.experts
    weights = shape.hidden * (2 * q + 2 * kv) + mlp
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
        """Seconds that the slowest pipeline rank takes for one micro-batch of `tokens`, spread over the
        context-parallel ranks."""
        policy, tp, cp = self.policy, self.parallel.tp, self.parallel.cp
        flops, layers = forward_flops(policy.hf, row), layers_of_stages(self.parallel, policy.layers)
        again = float(policy.recompute == "full")
        attention_again = float(policy.recompute != "none")
        passes = 3.0 + again if training else 1.0
        attention_passes = 3.0 + attention_again if training else 1.0
        fullest = flops.layer + (policy.copies - policy.mixture.chosen) * 2 * policy.mixture.expert_weights
        layer = tokens / cp * (fullest * passes + flops.attention * attention_passes) / tp / self.rate
        layer += self._messages(tokens, 2 + again if training else 1.0, training=training)
        head = responses / cp * flops.head * (3.0 if training else 1.0) / tp / self.rate
        hop = 0.0
        if self.parallel.pp > 1:
            size = self._hidden(tokens) / policy.sharded_by_sequence
            hop = size / self.network * self.parallel.vpp * (2 if training else 1)
        return hop + max([layer * count for count in layers[:-1]] + [layer * layers[-1] + head])

    def _hidden(self, tokens: float) -> float:
        """Bytes of the hidden states of one context-parallel rank's tokens of a micro-batch."""
        return tokens / self.parallel.cp * int(self.policy.hf["hidden_size"]) * self.policy.itemsize

    def _messages(self, tokens: float, rounds: float, *, training: bool) -> float:
        """Seconds of one layer's messages. `rounds`: forward passes and the backward, each with the same ones."""
        policy, tp, cp, ep = self.policy, self.parallel.tp, self.parallel.cp, self.parallel.ep
        size = self._hidden(tokens)
        # Attention and MLP all-reduce once each; experts gather and scatter what they are given: copies of tokens.
        reduces = rounds * (1 + (policy.copies or 1))
        if training and self.parallel.sequence_parallel:  # for dW their inputs are gathered again, experts' were kept
            reduces += 0.5 if policy.copies else 1.0
        seconds = reduces * 2 * (tp - 1) / tp * size / self.link(tp)
        sent = policy.copies * size / policy.sharded_by_sequence * (ep - 1) / ep
        seconds += 2 * rounds * sent / self.link(tp * ep)
        if cp > 1:
            shape = shape_of(policy.hf, tp=1)
            others = 2 * shape.kv_heads * shape.head_dim * policy.itemsize / tp * tokens * (cp - 1) / cp
            seconds += self._exchanges(training) * others / self.link(tp * cp)
        return seconds

    def _exchanges(self, training: bool) -> float:
        """How often all keys and values of a layer, or their gradients, go to the other context-parallel ranks: once a
        forward; a backward sends the gradients, and where there is a ring, the keys and values once more."""
        if not training:
            return 1.0
        forwards = 1.0 if self.policy.recompute == "none" else 2.0
        return forwards + (1.0 if self.policy.gathers_context else 2.0)

    def passes(self, rows: Sequence[Rows], *, training: bool) -> tuple[float, int]:
        """(seconds, micro-batches) of all `rows` through the pipelines of all replicas."""
        busy, total = 0.0, 0
        for each in rows:
            mine = each.count / self.policy.dp
            count = microbatches(mine, each.length, self.parallel.max_tokens_per_microbatch)
            if not count:
                continue
            if training and self.parallel.vpp > 1:
                count += -count % self.parallel.pp
            share = mine / count
            busy += count * self.microbatch(share * each.length, share * each.response, each.length, training=training)
            total += count
        idle = (self.parallel.pp - 1) / self.parallel.vpp
        return (busy * (1 + idle / total) if total else 0.0), total

    def swap(self, shard: Shard) -> float:
        """Seconds until the reference or the moving average is in place of the weights: float32, from the host."""
        return 4 * shard.parameters / (self.assumptions.host_gb_s * GIGA)

    def after_backward(self, shard: Shard) -> dict[str, float]:
        """Seconds of the gradients' reduction, the optimizer and the gathering of new weights, none of it hidden."""
        sharded, link = self.parallel.distributed_optimizer, self.link(self.parallel.tp * self.policy.replicas)
        parts = ((1 - shard.expert_share, self.policy.replicas), (shard.expert_share, self.policy.expert_replicas))
        reduce = gather = 0.0
        touched = shard.weights + 2.0 * shard.optimizer
        for share, ranks in parts:
            others = share * (ranks - 1) / ranks
            reduce += (1 if sharded else 2) * others * shard.gradients / link
            gather += others * shard.weights / link if sharded else 0.0
            touched += share * shard.gradients / (ranks if sharded else 1)
        adam = touched / (self.gpu.memory_gb_s * GIGA * self.assumptions.memory_efficiency)
        adam += 2 * shard.visiting / (self.assumptions.host_gb_s * GIGA)  # from host memory, and back
        return {"reduce gradients": reduce, "optimizer": adam, "gather weights": gather}
