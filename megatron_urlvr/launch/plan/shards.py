"""What one rank of each kind holds: built by the policy's own builder, wrapper and optimizer, and counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...config.optim import OptimSection
from ...config.parallel import ParallelSection
from ...distributed.layout import Layout
from ...policy.hf.families import Family
from ...policy.model import build_chunks, parameters_of
from ...policy.optimizer import PolicyOptimizer, wrap
from .mixture import Mixture, mixture_of
from .stream import EXPERTS, Stream, stream_of
from .world import pretended_rank

MOMENTS = 2
"""AdamW's, float32 like the masters; Megatron makes them at the first step."""


@dataclass(frozen=True)
class PlannedPolicy:
    """The policy and how it is laid out; the trainer has dp x tp x pp x cp ranks."""

    hf: Mapping[str, Any]
    """config.json of the model."""
    family: Family
    parallel: ParallelSection
    dp: int
    dtype: torch.dtype
    recompute: str
    optim: OptimSection | None
    """None: it scores and is not trained."""
    expert_imbalance: float = 1.0
    """Tokens of the fullest expert-parallel rank over the mean, as assumed."""

    @property
    def offloads(self) -> bool:
        """The optimizer's state is in host memory between steps."""
        return self.optim is not None and self.optim.offload

    @property
    def mixture(self) -> Mixture:
        """Its experts."""
        return mixture_of(self.hf)

    @property
    def stream(self) -> Stream:
        """The tensors that leave it."""
        return stream_of(self.hf, self.family, self.parallel)

    @property
    def copies(self) -> float:
        """Of a token, that the experts of the fullest rank are given for each token of that rank; 0 without experts."""
        return self.mixture.chosen * (self.expert_imbalance if self.parallel.ep > 1 else 1.0)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, experts aside, and share their optimizer."""
        return self.dp * self.parallel.cp

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts, and share their optimizer."""
        return self.replicas // self.parallel.ep

    @property
    def gathers_context(self) -> bool:
        """Whether a context-parallel rank gathers all keys and values of a layer: our own attention does, which
        prefixes are shared in; Transformer Engine passes them around a ring."""
        return self.parallel.cp > 1 and self.parallel.share_prefix is True

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
    expert_parameters: int = 0
    """Of `parameters`, those of this rank's experts."""
    offloaded: bool = False
    """The optimizer's part is on the GPU for its step alone, and in host memory otherwise."""

    @property
    def expert_share(self) -> float:
        """Of the parameters, and so of weights and gradients."""
        return self.expert_parameters / self.parameters

    @property
    def total(self) -> int:
        """Bytes that stay for the whole run."""
        return self.weights + self.gradients + self.optimizer - self.visiting

    @property
    def beside_servers(self) -> int:
        """Bytes that are there while servers on the same GPU generate: not the gradients, but an offloaded optimizer,
        which comes back to be saved."""
        return self.weights + self.optimizer

    @property
    def visiting(self) -> int:
        """Bytes that are there for the optimizer's step alone."""
        return self.optimizer if self.offloaded else 0


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
    """A shard for each kind of rank. Tensor-parallel ranks are alike (the vocabulary is padded), and so are context-,
    expert- and data-parallel ones: with a distributed optimizer the first holds the most."""
    parallel = policy.parallel
    stage = parallel.tp * parallel.cp * policy.dp
    shards = []
    for pp_ranks in kinds_of_stages(parallel, policy.layers):
        with pretended_rank(parallel, rank=pp_ranks[0] * stage, world_size=stage * parallel.pp) as layout:
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
    named = parameters_of(chunks)
    parameters = list(named.values())
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
        expert_parameters=sum(parameter.numel() for name, parameter in named.items() if EXPERTS in name),
        offloaded=policy.offloads,
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


def estimated_shards(policy: PlannedPolicy) -> list[Shard]:
    """`build_shards` by arithmetic on the tensors' shapes, for a search: without any padding."""
    parallel, hf = policy.parallel, policy.hf
    held = [stage.whole + stage.sharded / parallel.tp for stage in policy.stream.stages]
    if hf.get("tie_word_embeddings") and parallel.pp > 1:
        held[-1] += int(hf["vocab_size"]) * int(hf["hidden_size"]) / parallel.tp
    trained, sharded = policy.optim is not None, parallel.distributed_optimizer
    state = trained * (4 * MOMENTS + (4 if policy.itemsize < 4 else 0))
    layers = layers_of_stages(parallel, policy.layers)
    shards = []
    for pp_ranks in kinds_of_stages(parallel, policy.layers):
        dense, mine = held[pp_ranks[0]], policy.stream.stages[pp_ranks[0]].experts / parallel.tp / parallel.ep
        optimizer = dense / policy.replicas + mine / policy.expert_replicas if sharded else dense + mine
        shards.append(
            Shard(
                pp_ranks=pp_ranks,
                layers=layers[pp_ranks[0]],
                parameters=int(dense + mine),
                weights=int((dense + mine) * policy.itemsize),
                gradients=int((dense + mine) * 4 * trained),
                optimizer=int(optimizer * state),
                expert_parameters=int(mine),
                offloaded=policy.offloads,
            )
        )
    return shards
