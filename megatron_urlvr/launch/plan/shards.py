"""What one rank of each kind holds: built by the policy's own builder, wrapper and optimizer, and counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ...config.optim import OptimSection
from ...config.parallel import ParallelSection
from ...distributed.layout import Layout
from ...policy.hf.families import Family, rules_for, shape_of
from ...policy.hf.rules import expected_shape
from ...policy.model import build_chunks, parameters_of
from ...policy.optimizer import PolicyOptimizer, wrap
from .world import pretended_rank

MOMENTS = 2
"""AdamW's, float32 like the masters; Megatron makes them at the first step."""


@dataclass(frozen=True)
class PlannedPolicy:
    """The policy and how it is laid out; the trainer has dp x tp x pp ranks."""

    hf: Mapping[str, Any]
    """config.json of the model."""
    family: Family
    parallel: ParallelSection
    dp: int
    dtype: torch.dtype
    recompute: str
    optim: OptimSection | None
    """None: it scores and is not trained."""

    @property
    def layers(self) -> int:
        """Of the whole model."""
        return int(self.hf["num_hidden_layers"])

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return self.dtype.itemsize

    @property
    def sharded_by_sequence(self) -> int:
        """How many ranks share the tokens between tensor-parallel regions."""
        return self.parallel.tp if self.parallel.sequence_parallel else 1


@dataclass(frozen=True)
class Shard:
    """Bytes of one rank, and whom it stands for."""

    pp_ranks: tuple[int, ...]
    """Pipeline ranks that hold the like."""
    layers: int
    parameters: int
    """Of this rank, the vocabulary's padding included."""
    weights: int
    gradients: int
    optimizer: int
    """Float32 masters where weights are narrower, and two moments."""

    @property
    def total(self) -> int:
        """Bytes that stay for the whole run."""
        return self.weights + self.gradients + self.optimizer


def layers_of_stages(parallel: ParallelSection, layers: int) -> list[int]:
    """Layers of each pipeline rank, over its interleaved stages."""
    if parallel.stage_layers is None:
        return [layers // parallel.pp] * parallel.pp
    return [sum(parallel.stage_layers[rank :: parallel.pp]) for rank in range(parallel.pp)]


def kinds_of_stages(parallel: ParallelSection, layers: int) -> list[tuple[int, ...]]:
    """Pipeline ranks, those of equal shards together: the first, the last, and inner ones by their layers."""
    kinds: dict[tuple[bool, bool, int], list[int]] = {}
    for rank, count in enumerate(layers_of_stages(parallel, layers)):
        kinds.setdefault((rank == 0, rank == parallel.pp - 1, count), []).append(rank)
    return [tuple(ranks) for ranks in kinds.values()]


def build_shards(policy: PlannedPolicy) -> list[Shard]:
    """A shard for each kind of rank. Tensor-parallel ranks are alike (the vocabulary is padded), and so are
    data-parallel ones: with a distributed optimizer the first holds the most."""
    parallel = policy.parallel
    world = parallel.tp * parallel.pp * policy.dp
    shards = []
    for pp_ranks in kinds_of_stages(parallel, policy.layers):
        with pretended_rank(parallel, rank=pp_ranks[0] * parallel.tp * policy.dp, world_size=world) as layout:
            shards.append(_build_shard(policy, pp_ranks, layout))
    return shards


def _build_shard(policy: PlannedPolicy, pp_ranks: tuple[int, ...], layout: Layout) -> Shard:
    chunks = build_chunks(
        policy.hf,
        policy.family,
        policy.parallel,
        layout,
        dtype=policy.dtype,
        recompute=policy.recompute,
        share_prefix=policy.parallel.share_prefix is True,
        real_vocab=int(policy.hf["vocab_size"]),
    )
    parameters = list(parameters_of(chunks).values())
    gradients: list[torch.Tensor] = []
    masters: list[torch.Tensor] = []
    if policy.optim is not None:
        distributed = policy.parallel.distributed_optimizer
        trained = [wrap(chunk, distributed=distributed) for chunk in chunks]
        gradients = [parameter.main_grad for parameter in parameters]  # type: ignore[attr-defined]
        masters = [*_masters(PolicyOptimizer(policy.optim, trained, distributed=distributed))]
    weights = [parameter.data for parameter in parameters]
    return Shard(
        pp_ranks=pp_ranks,
        layers=sum(len(chunk.decoder.layers) for chunk in chunks),
        parameters=sum(parameter.numel() for parameter in parameters),
        weights=storage_bytes(weights),
        gradients=storage_bytes(gradients),
        optimizer=storage_bytes(masters, besides=weights) + MOMENTS * 4 * sum(master.numel() for master in masters),
    )


def _masters(optimizer: PolicyOptimizer) -> Iterator[torch.Tensor]:
    """What AdamW updates: this rank's part of the float32 weights."""
    for part in optimizer.parts:
        for group in part.optimizer.param_groups:
            yield from group["params"]


def storage_bytes(tensors: Iterable[torch.Tensor], besides: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the memory behind `tensors`, each stretch once; memory behind `besides` does not count."""
    seen = {tensor.untyped_storage()._cdata for tensor in besides}
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total


@dataclass(frozen=True)
class Tensor:
    """One Hugging Face tensor of the stream that leaves the policy."""

    name: str
    numel: int
    stage: int
    sharded: bool
    """Cut over tensor-parallel ranks; else each of them holds all of it."""


def stream_of(policy: PlannedPolicy) -> list[Tensor]:
    """The tensors of `Policy.export`, in its order, with the pipeline rank that holds each."""
    shape, family = shape_of(policy.hf, tp=1), policy.family
    tied = bool(policy.hf.get("tie_word_embeddings", False))
    stage_of = _stage_of_layers(policy.parallel, policy.layers)
    found = []
    for rule, layer in rules_for(family, policy.layers, tied=tied, experts=shape.experts):
        stage = stage_of[layer] if layer is not None else (0 if rule in family.first else policy.parallel.pp - 1)
        cut = rule.shard != "replicated"
        found += [Tensor(name, prod(expected_shape(name, shape)), stage, cut) for name in rule.hf]
    return found


def _stage_of_layers(parallel: ParallelSection, layers: int) -> list[int]:
    """Pipeline rank of each layer: stages are dealt to the ranks in turn."""
    stages = parallel.pp * parallel.vpp
    counts = parallel.stage_layers or [layers // stages] * stages
    return [stage % parallel.pp for stage, count in enumerate(counts) for _ in range(count)]


def estimated_shards(policy: PlannedPolicy) -> list[Shard]:
    """`build_shards` by arithmetic on the tensors' shapes, for a search: without any padding."""
    parallel, hf = policy.parallel, policy.hf
    held = [0.0] * parallel.pp
    for tensor in stream_of(policy):
        held[tensor.stage] += tensor.numel / (parallel.tp if tensor.sharded else 1)
    if hf.get("tie_word_embeddings") and parallel.pp > 1:
        held[-1] += int(hf["vocab_size"]) * int(hf["hidden_size"]) / parallel.tp
    trained = policy.optim is not None
    masters = 4 if policy.itemsize < 4 else 0
    state = trained * (4 * MOMENTS + masters) / (policy.dp if policy.parallel.distributed_optimizer else 1)
    layers = layers_of_stages(parallel, policy.layers)
    shards = []
    for pp_ranks in kinds_of_stages(parallel, policy.layers):
        count = held[pp_ranks[0]]
        weights, gradients = int(count * policy.itemsize), int(count * 4 * trained)
        shards.append(Shard(pp_ranks, layers[pp_ranks[0]], int(count), weights, gradients, int(count * state)))
    return shards
