"""The tensors that leave the policy, in their order, and what each pipeline stage has of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

from ...config.parallel import ParallelSection
from ...policy.hf.families import Family, rules_for, shape_of
from ...policy.hf.rules import Shape, expected_shape

EXPERTS = ".experts."
"""In the names of experts' weights, Megatron's and Hugging Face's."""


@dataclass(frozen=True)
class Tensor:
    """One Hugging Face tensor of the stream that leaves the policy."""

    name: str
    numel: int
    stage: int
    sharded: bool
    """Cut over tensor-parallel ranks; else each of them holds all of it."""

    @property
    def expert(self) -> bool:
        """Whether it is an expert's, and so on one of the expert-parallel ranks alone."""
        return EXPERTS in self.name


@dataclass(frozen=True)
class Stage:
    """One pipeline stage's part of the stream; sizes in elements."""

    tensors: int
    whole: int
    """Of what every tensor-parallel rank holds all of."""
    sharded: int
    """Of what is cut over them, experts aside."""
    experts: int
    largest: int
    """Of what is gathered at once: a tensor, or a gate with its up projection."""

    @property
    def numel(self) -> int:
        """Of all its tensors."""
        return self.whole + self.sharded + self.experts


@dataclass(frozen=True, eq=False)
class Stream:
    """All tensors of `Policy.export`. There is one object for each model and cut into stages: a search asks for those
    of thousands of experts again and again."""

    tensors: Sequence[Tensor]
    stages: Sequence[Stage]
    largest: int
    """Elements of the largest tensor."""

    @property
    def numel(self) -> int:
        """Parameters of the model."""
        return sum(stage.numel for stage in self.stages)

    @property
    def experts(self) -> int:
        """Parameters of its experts."""
        return sum(stage.experts for stage in self.stages)


def stream_of(hf: Mapping[str, Any], family: Family, parallel: ParallelSection) -> Stream:
    """The tensors of a model with the pipeline rank that holds each."""
    layers, tied = int(hf["num_hidden_layers"]), bool(hf.get("tie_word_embeddings", False))
    return _stream(family, tied, shape_of(hf, tp=1), tuple(_stage_of_layers(parallel, layers)), parallel.pp)


@cache
def _stream(family: Family, tied: bool, shape: Shape, stage_of: tuple[int, ...], pp: int) -> Stream:
    tensors = []
    for rule, layer in rules_for(family, len(stage_of), tied=tied, experts=shape.experts):
        stage = stage_of[layer] if layer is not None else (0 if rule in family.first else pp - 1)
        cut = rule.shard != "replicated"
        tensors += [Tensor(name, prod(expected_shape(name, shape)), stage, cut) for name in rule.hf]
    stages = [_stage([tensor for tensor in tensors if tensor.stage == stage]) for stage in range(pp)]
    return Stream(tensors, stages, max(tensor.numel for tensor in tensors))


def _stage(tensors: Sequence[Tensor]) -> Stage:
    gates = [2 * tensor.numel for tensor in tensors if tensor.name.endswith("gate_proj.weight")]
    experts = sum(tensor.numel for tensor in tensors if tensor.expert)
    whole = sum(tensor.numel for tensor in tensors if not tensor.sharded)
    everything = sum(tensor.numel for tensor in tensors)
    largest = max([tensor.numel for tensor in tensors] + gates, default=0)
    return Stage(len(tensors), whole, everything - whole - experts, experts, largest)


def _stage_of_layers(parallel: ParallelSection, layers: int) -> list[int]:
    """Pipeline rank of each layer: stages are dealt to the ranks in turn."""
    stages = parallel.pp * parallel.vpp
    counts = parallel.stage_layers or [layers // stages] * stages
    return [stage % parallel.pp for stage, count in enumerate(counts) for _ in range(count)]
