"""How one Megatron-Core parameter is made of Hugging Face tensors, and how it is sharded.

A rule works on *whole* tensors; sharding over tensor-parallel ranks is a property beside it. Rules exist for the five
ways a decoder stores things; a family is a table of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

Shard = Literal["replicated", "rows", "columns", "gated", "vocab"]
"""`rows`: dim 0 over ranks; `columns`: dim 1; `gated`: each half of dim 0; `vocab`: dim 0 after padding."""


@dataclass(frozen=True)
class Shape:
    """What rules need to know of a model."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocab_size: int
    """Entries of the HF config."""
    padded_vocab: int
    """Entries of Megatron's table, a multiple of the tensor-parallel size."""
    experts: int = 0
    """Experts of each layer; 0 in a dense model."""
    expert_ffn: int = 0
    """Channels of one expert."""


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter: its name, its HF parts, and its sharding. `{l}` in a name stands for the layer, `{e}` for
    the expert."""

    megatron: str
    hf: tuple[str, ...]
    shard: Shard
    merge: Callable[[list[torch.Tensor], Shape], torch.Tensor]
    """HF tensors -> the whole Megatron tensor."""
    split: Callable[[torch.Tensor, Shape], list[torch.Tensor]]
    """The whole Megatron tensor -> HF tensors, in the order of `hf`."""
    expert: int | None = None
    """The expert that `at` chose; None for what all experts have in common."""

    def at(self, layer: int, expert: int = 0) -> Rule:
        """This rule for one layer (and expert)."""
        names = (self.megatron, *self.hf)
        megatron, *hf = (name.replace("{l}", str(layer)).replace("{e}", str(expert)) for name in names)
        return replace(self, megatron=megatron, hf=tuple(hf), expert=expert if self.per_expert else None)

    @property
    def per_expert(self) -> bool:
        """Whether each expert has a parameter of this kind."""
        return "{e}" in self.megatron


def _one(parts: list[torch.Tensor], shape: Shape) -> torch.Tensor:
    return parts[0]


def _itself(tensor: torch.Tensor, shape: Shape) -> list[torch.Tensor]:
    return [tensor]


def _pad_vocab(parts: list[torch.Tensor], shape: Shape) -> torch.Tensor:
    table = parts[0]
    missing = shape.padded_vocab - table.shape[0]
    return torch.cat([table, table.new_zeros(missing, table.shape[1])]) if missing else table


def _cut_vocab(tensor: torch.Tensor, shape: Shape) -> list[torch.Tensor]:
    return [tensor[: shape.vocab_size]]


def _merge_qkv(parts: list[torch.Tensor], shape: Shape) -> torch.Tensor:
    """Megatron interleaves by KV group: the group's queries, its key, its value."""
    rest = parts[0].shape[1:]
    q, k, v = (part.view(shape.kv_heads, -1, *rest) for part in parts)
    return torch.cat((q, k, v), 1).reshape(-1, *rest)


def _split_qkv(tensor: torch.Tensor, shape: Shape) -> list[torch.Tensor]:
    rest = tensor.shape[1:]
    queries = shape.heads // shape.kv_heads * shape.head_dim
    grouped = tensor.view(shape.kv_heads, -1, *rest)
    parts = grouped.split([queries, shape.head_dim, shape.head_dim], 1)
    return [part.reshape(-1, *rest) for part in parts]


def _stack(parts: list[torch.Tensor], shape: Shape) -> torch.Tensor:
    return torch.cat(parts)


def _halves(tensor: torch.Tensor, shape: Shape) -> list[torch.Tensor]:
    return list(tensor.chunk(2))


def same(megatron: str, hf: str, shard: Shard = "replicated") -> Rule:
    """A tensor stored alike on both sides."""
    return Rule(megatron, (hf,), shard, _one, _itself)


def vocab(megatron: str, hf: str) -> Rule:
    """An embedding or output table, padded on Megatron's side."""
    return Rule(megatron, (hf,), "vocab", _pad_vocab, _cut_vocab)


def qkv(megatron: str, q: str, k: str, v: str) -> Rule:
    """Fused query, key and value projections (weights or biases)."""
    return Rule(megatron, (q, k, v), "rows", _merge_qkv, _split_qkv)


def gated(megatron: str, gate: str, up: str) -> Rule:
    """The gate and up projections of a gated MLP, stacked."""
    return Rule(megatron, (gate, up), "gated", _stack, _halves)


def take_shard(tensor: torch.Tensor, shard: Shard, rank: int, size: int) -> torch.Tensor:
    """This rank's part of a whole Megatron tensor."""
    if size == 1 or shard == "replicated":
        return tensor
    if shard == "columns":
        return tensor.chunk(size, 1)[rank]
    if shard == "gated":
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(size)[rank]


def join_shards(parts: list[torch.Tensor], shard: Shard) -> torch.Tensor:
    """The whole Megatron tensor from all ranks' parts, in rank order."""
    if len(parts) == 1 or shard == "replicated":
        return parts[0]
    if shard == "columns":
        return torch.cat(parts, 1)
    if shard == "gated":
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(parts)


def expected_shape(name: str, shape: Shape) -> tuple[int, ...]:
    """Shape of a Hugging Face tensor of a Llama-like decoder, by the end of its name."""
    h, d = shape.hidden, shape.head_dim
    ffn = shape.expert_ffn if ".experts." in name else shape.ffn
    shapes: Mapping[str, tuple[int, ...]] = {
        "embed_tokens.weight": (shape.vocab_size, h),
        "lm_head.weight": (shape.vocab_size, h),
        "q_proj.weight": (shape.heads * d, h),
        "k_proj.weight": (shape.kv_heads * d, h),
        "v_proj.weight": (shape.kv_heads * d, h),
        "q_proj.bias": (shape.heads * d,),
        "k_proj.bias": (shape.kv_heads * d,),
        "v_proj.bias": (shape.kv_heads * d,),
        "o_proj.weight": (h, shape.heads * d),
        "q_norm.weight": (d,),
        "k_norm.weight": (d,),
        "gate_proj.weight": (ffn, h),
        "up_proj.weight": (ffn, h),
        "down_proj.weight": (h, ffn),
        "mlp.gate.weight": (shape.experts, h),
    }
    for end, expected in shapes.items():
        if name.endswith(end):
            return expected
    return (h,)  # norms
