"""Weights in and out of the policy: Hugging Face folders in, one stream of Hugging Face-named tensors out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..distributed.layout import Layout
from .hf.families import TRANSFORMER_ENGINE_NAMES, Family, rules_for, shape_of
from .hf.folder import TensorFolder
from .hf.rules import Rule, Shape, expected_shape, join_shards, take_shard
from .model import PolicyModel, has_transformer_engine, parameters_of


@dataclass(frozen=True)
class Slot:
    """One Megatron parameter of the whole model, and where it lives."""

    rule: Rule
    stage: int
    owner: int | None
    """Expert-parallel rank that has it; None where all have."""
    local: torch.nn.Parameter | None
    """This rank's shard; None where others have it."""


class WeightMap:
    """The policy's parameters by Hugging Face name, at any layout."""

    def __init__(self, chunks: Sequence[PolicyModel], family: Family, hf: Mapping[str, Any], layout: Layout) -> None:
        self.layout = layout
        self.shape: Shape = shape_of(hf, tp=layout.tp)
        self.tied = bool(hf.get("tie_word_embeddings", False))
        layers = int(hf["num_hidden_layers"])
        mine = parameters_of(chunks)
        stage_of = self._stages(mine, layers)
        self.slots: list[Slot] = []
        for rule, layer in rules_for(family, layers, tied=self.tied, experts=self.shape.experts):
            name = local_name(rule.megatron, experts=family.experts)
            stage = stage_of[layer] if layer is not None else (0 if rule in family.first else layout.pp - 1)
            owner = None if rule.expert is None else rule.expert * layout.ep // self.shape.experts
            self.slots.append(Slot(rule, stage, owner, mine.get(name) if stage == layout.pp_rank else None))
        # With tied embeddings the last of several stages holds a copy of the input table as its output layer.
        self.tied_copy = mine.get("output_layer.weight") if self.tied else None

    def _stages(self, mine: Mapping[str, Any], layers: int) -> list[int]:
        """Pipeline stage of each layer."""
        held = torch.full((layers,), -1)
        for name in mine:
            if name.startswith("decoder.layers."):
                held[int(name.split(".")[2])] = self.layout.pp_rank
        if self.layout.pp > 1:
            dist.all_reduce(held, op=dist.ReduceOp.MAX, group=self.layout.replica)
        return [int(stage) for stage in held]

    def load(self, folder: str | Path) -> None:
        """Copy a Hugging Face folder's tensors into this rank's shards, one tensor at a time.

        Raises UnusableInput naming a missing, misshapen or unexpected tensor.
        """
        source = TensorFolder(folder)
        source.refuse_unexpected({name for slot in self.slots for name in slot.rule.hf}, tied=self.tied)
        with torch.no_grad():
            for slot in self.slots:
                tied_here = self.tied_copy is not None and slot is self.slots[0]
                if slot.local is None and not tied_here:
                    continue
                parts = [source.read(name, expected_shape(name, self.shape)) for name in slot.rule.hf]
                whole = slot.rule.merge(parts, self.shape)
                shard = take_shard(whole, slot.rule.shard, self.layout.tp_rank, self.layout.tp)
                if slot.local is not None:
                    slot.local.copy_(shard)
                if tied_here:
                    assert self.tied_copy is not None
                    self.tied_copy.copy_(shard)

    @torch.no_grad()
    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Stream the weights as (Hugging Face name, whole tensor), the same on every rank. Collective.

        Every rank must drain the stream, also when what it does with a tensor fails. Tensors may be views of live
        parameters: copy what outlives the step.
        """
        layout = self.layout
        for slot in self.slots:
            whole = None
            if slot.local is not None:
                parts = [slot.local.data]
                if layout.tp > 1 and slot.rule.shard != "replicated":
                    parts = [torch.empty_like(slot.local.data) for _ in range(layout.tp)]
                    dist.all_gather(parts, slot.local.data.contiguous(), group=layout.tensor)
                whole = join_shards(parts, slot.rule.shard)
            if layout.ep > 1 and slot.owner is not None and slot.stage == layout.pp_rank:
                whole = self._handed_on(whole, slot.owner, layout.experts)
            if layout.pp > 1:
                whole = self._handed_on(whole, slot.stage, layout.pipeline)
            assert whole is not None
            yield from zip(slot.rule.hf, slot.rule.split(whole, self.shape), strict=True)

    def _handed_on(self, whole: torch.Tensor | None, source: int, group: Any) -> torch.Tensor:
        """Broadcast a whole tensor from rank `source` of a group."""
        shape = torch.zeros(3, dtype=torch.int64, device=self.layout.device)
        if whole is not None:
            whole = whole.contiguous()
            shape[: whole.dim()] = torch.tensor(whole.shape)
        dist.broadcast(shape, group=group, group_src=source)
        if whole is None:
            size = [int(n) for n in shape if n]
            whole = torch.empty(size, dtype=self._dtype, device=self.layout.device)
        dist.broadcast(whole, group=group, group_src=source)
        return whole

    @property
    def _dtype(self) -> torch.dtype:
        return next(slot.local.dtype for slot in self.slots if slot.local is not None)


def local_name(name: str, *, experts: bool = False) -> str:
    """A rule's Megatron name as the layer spec in use spells it. A mixture of `experts` keeps its norm apart."""
    if has_transformer_engine() and name.startswith("decoder.layers."):
        for plain, fused in TRANSFORMER_ENGINE_NAMES.items():
            if name.endswith("." + plain) and not (experts and plain.startswith("pre_mlp")):
                return name.removesuffix(plain) + fused
    return name


class Shadow:
    """Weights that stay as they are beside the policy's: the reference.

    Tensors are float32 in host memory, one for each of this rank's parameters (`parameters_of`).
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.tensors = {name: parameter.detach().float().cpu().clone() for name, parameter in parameters.items()}

    def swapped_into(self, parameters: Mapping[str, torch.nn.Parameter]) -> AbstractContextManager[None]:
        """Run with these weights in the model; the policy's own come back bit for bit."""
        return swapped(parameters, self.tensors.__getitem__)


@contextmanager
def swapped(parameters: Mapping[str, torch.nn.Parameter], other: Callable[[str], torch.Tensor]) -> Iterator[None]:
    """Run with `other` weights in the model; its own come back bit for bit, whatever happens inside.

    `copy_` bumps tensor versions, so that caches of the head (its column sums) are made anew.
    """
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(other(name))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
