"""Bytes of a trainer's GPU at its worst moment, and of a server's GPU.

Activations follow what Megatron's layers with Transformer Engine keep for the backward, the method of Korthikanti et
al. (arXiv 2205.05198, section 4) applied to a decoder with RMSNorm, grouped queries, a gated MLP whose two halves are
multiplied unfused (`bias_activation_fusion=False`), flash attention and no dropout. A test holds the count against what
a real layer keeps on a CPU, whose norms and packed attention keep a little more.

A context-parallel rank keeps the like for its part of each sequence. Experts keep theirs for every copy of a token that
they are given; those of the fullest rank are planned for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...config.parallel import ParallelSection
from ...config.servers import PoolSection
from ...policy.hf.families import shape_of
from ...policy.hf.rules import Shape
from .hardware import GPU
from .mixture import mixture_of
from .shards import PlannedPolicy, Shard

HEAD_STASH = 512 << 20
HEAD_WORKSPACE = 128 << 20
"""`urlvr_kernels.DEFAULT_STASH_BYTES` and `DEFAULT_WORKSPACE_BYTES`: tests compare them."""


def layer_activations(policy: PlannedPolicy) -> dict[str, float]:
    """Bytes a token that one layer keeps under recompute none, by tensor. Between tensor-parallel regions sequence
    parallelism shards by tokens."""
    tp, sp, itemsize = policy.parallel.tp, policy.sharded_by_sequence, policy.itemsize
    shape = shape_of(policy.hf, tp=tp)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kept = {
        "inputs of both norms": 2 * itemsize * shape.hidden / sp,
        "outputs of both norms": 2 * itemsize * shape.hidden / sp,
        "queries, keys, values": itemsize * (q + 2 * kv) / tp,
        "attention's output": itemsize * q / tp + 4 * shape.heads / tp,
    }
    if policy.family.qk_norm:
        kept["queries and keys before their norm"] = itemsize * (q + kv) / tp
    return kept | (_kept_by_experts(policy) if shape.experts else _kept_by_mlp(shape.ffn / tp, itemsize))


def _kept_by_mlp(channels: float, itemsize: int) -> dict[str, float]:
    """Bytes of a token in a gated MLP with so many channels on this rank."""
    return {
        "gate and up": 2 * itemsize * channels,
        "up, with Megatron's offset of zero": itemsize * channels,
        "silu(gate)": itemsize * channels,
        "their product": itemsize * channels,
    }


def _kept_by_experts(policy: PlannedPolicy) -> dict[str, float]:
    """Bytes of a token in a mixture, whose experts take its copies from all ranks and are cut by tp themselves."""
    tp, itemsize, copies = policy.parallel.tp, policy.itemsize, policy.copies
    shape, chosen = shape_of(policy.hf, tp=tp), policy.mixture.chosen
    channels = shape.expert_ffn / tp
    each = _kept_by_mlp(channels, itemsize) | {
        "experts' input": itemsize * shape.hidden,
        "product, weighed": itemsize * channels,
        "weight": 4,
        "where copies come from": 8,
    }
    router = {
        "router's weights of the chosen": 4 * chosen / policy.sharded_by_sequence,
        "router's weights, by expert": 4 * shape.experts / policy.sharded_by_sequence,
        "router's choices": (shape.experts + 8 * chosen) / policy.sharded_by_sequence,
    }
    return router | {name: copies * size for name, size in each.items()}


def kept_per_token(policy: PlannedPolicy, recompute: str) -> float:
    """Bytes a token that one layer keeps from forward to backward under a recompute mode."""
    if recompute == "full":
        return policy.itemsize * int(policy.hf["hidden_size"]) / policy.sharded_by_sequence
    everything = sum(layer_activations(policy).values())
    if recompute == "selective":  # the attention core runs again: flash attention kept only its log-sum-exps
        return everything - 4 * int(policy.hf["num_attention_heads"]) / policy.parallel.tp
    return everything


def in_flight(parallel: ParallelSection, pp_rank: int, microbatches: int) -> float:
    """Most micro-batches whose activations a pipeline rank holds, in units of all its layers. Megatron's 1F1B, and its
    interleaved schedule (pipeline_parallel/schedules.py, get_pp_rank_microbatches)."""
    pp, vpp = parallel.pp, parallel.vpp
    if vpp == 1:
        return min(microbatches, pp - pp_rank)
    warmup = (pp - pp_rank - 1) * 2 + (vpp - 1) * pp
    return min(microbatches * vpp, warmup + 1) / vpp


@dataclass(frozen=True)
class RankMemory:
    """One trainer rank, bytes. `update`, `score`, `sync` and what visits for the optimizer's step are needed one after
    the other, beside what stays."""

    shard: Shard
    activations: int
    working: int
    head: int
    score: int
    sync: int
    reserve: int

    @property
    def update(self) -> int:
        """For the update step."""
        return self.activations + self.working + self.head

    @property
    def peak(self) -> int:
        """The most at any time."""
        return self.shard.total + self.reserve + max(self.update, self.score, self.sync, self.shard.visiting)


@dataclass(frozen=True)
class Load:
    """What the trainer's ranks are given at the worst."""

    tokens: int
    """Of the largest micro-batch, over its context-parallel ranks."""
    microbatches: int
    swaps: bool
    """The reference or moving average is swapped in for scoring, beside a copy of the weights."""
    bucket_bytes: int
    """Of the weight sync."""
    reserve: int


def rank_memory(shard: Shard, policy: PlannedPolicy, load: Load) -> RankMemory:
    """The worst rank of a kind: the first of its pipeline ranks has the most micro-batches in flight."""
    parallel, itemsize, tokens = policy.parallel, policy.itemsize, load.tokens // policy.parallel.cp
    shape = shape_of(policy.hf, tp=parallel.tp)
    flying = in_flight(parallel, shard.pp_ranks[0], load.microbatches)
    layer = sum(layer_activations(policy).values())
    last = parallel.pp - 1 in shard.pp_ranks
    largest_weight = itemsize * _largest_matrix(shape) // parallel.tp
    exchanged = _exchanged(policy, load.tokens)
    again = layer * tokens if policy.recompute == "full" else 0
    forward_only = (layer + 2 * itemsize * shape.hidden / policy.sharded_by_sequence) * tokens + exchanged
    vocab = shape.padded_vocab // parallel.tp
    head = _head(tokens, shape.hidden, vocab, itemsize) if last else 0
    scoring_head = _head(tokens, shape.hidden, vocab, itemsize, training=False) if last else 0
    return RankMemory(
        shard=shard,
        activations=int(flying * shard.layers * kept_per_token(policy, policy.recompute) * tokens),
        working=int(_gradients(policy, shape) * tokens + largest_weight + again + 2 * exchanged),
        head=head,
        score=int(forward_only) + scoring_head + (shard.weights if load.swaps else 0),
        sync=_sync(shard, policy, load),
        reserve=load.reserve,
    )


def _gradients(policy: PlannedPolicy, shape: Shape) -> float:
    """Bytes a token of the gradients of a layer's own tensors while its MLP's, or experts', backward runs."""
    tp, itemsize = policy.parallel.tp, policy.itemsize
    if shape.experts:
        return itemsize * (policy.copies * (3 * shape.expert_ffn / tp + 2 * shape.hidden) + 2 * shape.hidden)
    return itemsize * (3 * shape.ffn / tp + 2 * shape.hidden)


def _largest_matrix(shape: Shape) -> int:
    """Elements of a layer's largest weight, whose gradient is there whole before it is added up."""
    if not shape.experts:
        return 2 * shape.ffn * shape.hidden
    return shape.hidden * max(2 * shape.expert_ffn, (shape.heads + 2 * shape.kv_heads) * shape.head_dim)


def _exchanged(policy: PlannedPolicy, tokens: int) -> float:
    """Bytes of the other context-parallel ranks' keys and values of one layer: all that were gathered, or the part that
    is attended to and the next one on its way around the ring. Their gradients take as much again."""
    cp, shape = policy.parallel.cp, shape_of(policy.hf, tp=policy.parallel.tp)
    if cp == 1:
        return 0.0
    whole = 2 * policy.itemsize * shape.kv_heads * shape.head_dim / policy.parallel.tp * tokens
    return whole if policy.gathers_context else 2 * whole / cp


def _sync(shard: Shard, policy: PlannedPolicy, load: Load) -> int:
    """Whole tensors on their way out: the parts, the whole and its Hugging Face form; the sender's two buckets too."""
    stream, itemsize = policy.stream, policy.itemsize
    whole = stream.largest * itemsize
    own = max(stream.stages[rank].largest for rank in shard.pp_ranks) * itemsize
    sender = 0 in shard.pp_ranks
    passing = whole if policy.parallel.pp > 1 else 0
    return 3 * max(own, passing) + (2 * max(load.bucket_bytes, whole) if sender else 0)


def _head(tokens: int, hidden: int, vocab: int, itemsize: int, *, training: bool = True) -> int:
    """Upper bound of the statistics head's memory: gathered rows, a workspace of logits, and for training the stash
    and dH, whose sum is float32."""
    rows = tokens * hidden * itemsize
    if not training:
        return rows + HEAD_WORKSPACE
    return 2 * rows + 4 * tokens * hidden + HEAD_WORKSPACE + min(HEAD_STASH, tokens * vocab * itemsize)


@dataclass(frozen=True)
class ServerMemory:
    """One GPU of a rollout server, bytes."""

    weights: int
    experts: int
    """Of the weights, those of experts."""
    kv_cache: int
    """What `mem_fraction` leaves for the cache."""
    kv_token: float
    """Bytes of one token's keys and values on one GPU."""
    other: int
    """What `mem_fraction` leaves to activations, CUDA graphs and buffers."""
    trainer: int = 0
    """What a trainer on the same GPU keeps while the server generates."""

    @property
    def tokens(self) -> int:
        """Tokens that the cache of one server holds."""
        return max(0, int(self.kv_cache / self.kv_token))


def server_memory(
    hf: Mapping[str, Any], pool: PoolSection, gpu: GPU, *, parameters: int, itemsize: int, trainer: int = 0
) -> ServerMemory:
    """One GPU of a server: weights are cut by tp, KV heads as far as there are any. `trainer`: bytes that a trainer on
    the same GPU keeps meanwhile."""
    shape = shape_of(hf, tp=1)
    heads = max(1, shape.kv_heads // pool.tp)
    weights = parameters * itemsize // pool.tp
    static = int(pool.mem_fraction * gpu.memory)
    return ServerMemory(
        weights=weights,
        experts=mixture_of(hf).parameters * itemsize // pool.tp,
        kv_cache=static - weights,
        kv_token=2 * int(hf["num_hidden_layers"]) * heads * shape.head_dim * itemsize,
        other=gpu.memory - static - trainer,
        trainer=trainer,
    )
