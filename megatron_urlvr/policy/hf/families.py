"""The model families this program trains: how a Hugging Face config and its tensors map to Megatron-Core."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...exit_codes import UnusableInput
from .rules import Rule, Shape, gated, qkv, same, vocab

_LAYER = "decoder.layers.{l}."
_ATTENTION = _LAYER + "self_attention."
_MLP = _LAYER + "mlp."
_EXPERT = _MLP + "experts.local_experts.{e}."
_HF = "model.layers.{l}."
_HF_EXPERT = _HF + "mlp.experts.{e}."

_EMBEDDING = (vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight"),)
_NORMS = (
    same(_LAYER + "input_layernorm.weight", _HF + "input_layernorm.weight"),
    same(_LAYER + "pre_mlp_layernorm.weight", _HF + "post_attention_layernorm.weight"),
)
_PROJECTIONS = (
    qkv(_ATTENTION + "linear_qkv.weight", *(f"{_HF}self_attn.{x}_proj.weight" for x in "qkv")),
    same(_ATTENTION + "linear_proj.weight", _HF + "self_attn.o_proj.weight", "columns"),
)
_QKV_BIAS = (qkv(_ATTENTION + "linear_qkv.bias", *(f"{_HF}self_attn.{x}_proj.bias" for x in "qkv")),)
_QK_NORM = tuple(same(_ATTENTION + f"{x}_layernorm.weight", _HF + f"self_attn.{x}_norm.weight") for x in "qk")
_GATED_MLP = (
    gated(_MLP + "linear_fc1.weight", _HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
    same(_MLP + "linear_fc2.weight", _HF + "mlp.down_proj.weight", "columns"),
)
_EXPERTS = (
    same(_MLP + "router.weight", _HF + "mlp.gate.weight"),
    gated(_EXPERT + "linear_fc1.weight", _HF_EXPERT + "gate_proj.weight", _HF_EXPERT + "up_proj.weight"),
    same(_EXPERT + "linear_fc2.weight", _HF_EXPERT + "down_proj.weight", "columns"),
)
_FINAL = (same("decoder.final_layernorm.weight", "model.norm.weight"),)
_HEAD = vocab("output_layer.weight", "lm_head.weight")


@dataclass(frozen=True)
class Family:
    """One architecture: Megatron parameters of the embedding, of each layer, and of the head."""

    architecture: str
    """`architectures[0]` of config.json."""
    layer: tuple[Rule, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False
    """Every layer's MLP is a mixture of experts."""
    first: tuple[Rule, ...] = _EMBEDDING
    last: tuple[Rule, ...] = _FINAL
    head: Rule = _HEAD
    """The output table, absent from the folder when embeddings are tied."""


QWEN2 = Family("Qwen2ForCausalLM", (*_NORMS, *_PROJECTIONS, *_QKV_BIAS, *_GATED_MLP), qkv_bias=True)
QWEN3 = Family("Qwen3ForCausalLM", (*_NORMS, *_PROJECTIONS, *_QK_NORM, *_GATED_MLP), qk_norm=True)
LLAMA = Family("LlamaForCausalLM", (*_NORMS, *_PROJECTIONS, *_GATED_MLP))
QWEN3_MOE = Family("Qwen3MoeForCausalLM", (*_NORMS, *_PROJECTIONS, *_QK_NORM, *_EXPERTS), qk_norm=True, experts=True)

FAMILIES: Mapping[str, Family] = {family.architecture: family for family in (QWEN2, QWEN3, LLAMA, QWEN3_MOE)}

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
"""What a config.json must give as whole numbers."""

OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "num_experts", "num_local_experts")
"""The same, where it gives them."""

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
}
"""Settings of config.json of which only these values are built."""
ROPE_TYPES = ("default", "llama3")
LLAMA3_FIELDS = frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"})

EXPERT_SIZES = ("num_experts_per_tok", "moe_intermediate_size")
"""The same, of a mixture of experts (and `num_experts`, under either of its names)."""

# Transformer Engine fuses a norm into the projection behind it and stores its weight there.
TRANSFORMER_ENGINE_NAMES: Mapping[str, str] = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def family_of(hf_config: Mapping[str, Any], folder: str) -> Family:
    """The family of a config.json; UnusableInput names the folder, what was found and what is supported."""
    names = hf_config.get("architectures")
    name = names[0] if isinstance(names, list) and names else names or "(none)"
    family = FAMILIES.get(name) if isinstance(name, str) and isinstance(names, list) else None
    if family is None:
        raise UnusableInput(
            f"model.path = {folder}: architecture {name!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    sizes = (*SIZES, *EXPERT_SIZES) if family.experts else SIZES
    missing = [name for name in sizes if hf_config.get(name) is None]
    if family.experts and not experts_of(hf_config):
        missing.append("num_experts")
    if missing:
        raise UnusableInput(f"model.path = {folder}: its config.json does not say {', '.join(missing)}")
    _refuse_nonsense(hf_config, folder, sizes)
    for name, allowed in UNSUPPORTED.items():
        value = hf_config.get(name)
        if value is not None and value not in allowed:
            shown = json.dumps(value)
            raise UnusableInput(
                f"model.path = {folder}: {name} = {shown} is not supported; supported: "
                + " or ".join(json.dumps(each) for each in allowed)
            )
    if rope_type(hf_config) not in ROPE_TYPES:
        raise UnusableInput(
            f"model.path = {folder}: rope type {rope_type(hf_config)!r}; supported: {', '.join(ROPE_TYPES)}"
        )
    if rope_type(hf_config) == "llama3" and (lacking := sorted(LLAMA3_FIELDS - set(_rope(hf_config)))):
        raise UnusableInput(
            f"model.path = {folder}: its config.json asks for rope type 'llama3' without {', '.join(lacking)}"
        )
    return family


def _refuse_nonsense(hf_config: Mapping[str, Any], folder: str, sizes: Sequence[str]) -> None:
    """UnusableInput for a size that is no whole number above 0, heads that cannot be shared, and rotary settings that
    are none."""

    def refuse(name: str, value: object, expected: str) -> None:
        raise UnusableInput(f"model.path = {folder}: its config.json says {name} = {value!r}; {expected} is expected")

    for name in (*sizes, *OPTIONAL_SIZES):
        value = hf_config.get(name)
        if value is not None and (type(value) is not int or value < 1):
            refuse(name, value, "a whole number above 0")
    heads, kv_heads = hf_config["num_attention_heads"], hf_config.get("num_key_value_heads")
    if kv_heads and heads % kv_heads:
        refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads = {heads}")
    if not isinstance(tied := hf_config.get("tie_word_embeddings", False), bool):
        refuse("tie_word_embeddings", tied, "true or false")
    for name in ("rope_parameters", "rope_scaling"):
        if hf_config.get(name) is not None and not isinstance(hf_config[name], dict):
            refuse(name, hf_config[name], "an object")
    numbers = {"rope_theta": hf_config.get("rope_theta"), **_rope(hf_config)}
    for name in ("rope_theta", *sorted(LLAMA3_FIELDS)):
        value = numbers.get(name)
        if value is not None and (type(value) not in (int, float) or not value > 0):
            refuse(name, value, "a number above 0")


def experts_of(hf_config: Mapping[str, Any]) -> int:
    """Experts a layer: `num_experts`, which transformers 5 writes as `num_local_experts`; 0 when neither is there."""
    return int(hf_config.get("num_experts") or hf_config.get("num_local_experts") or 0)


def _rope(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    return hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}


def rope_type(hf_config: Mapping[str, Any]) -> str:
    """Kind of rotary scaling; `default` is none."""
    scaling = _rope(hf_config)
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def rope_theta(hf_config: Mapping[str, Any]) -> float:
    """Rotary base: top-level in older config.json files, under `rope_parameters` in newer ones."""
    parameters = hf_config.get("rope_parameters") or {}
    return float(parameters.get("rope_theta") or hf_config.get("rope_theta") or 10000.0)


def rope_frequencies(hf_config: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """`[head_dim / 2]` float32 angles a position, theta^(-2 i / head_dim), on the CPU.

    With rope type llama3 (the Llama 3.1 release; `_compute_llama3_parameters` of transformers) wavelengths above
    `original / low_freq_factor` are stretched by `factor`, those below `original / high_freq_factor` are left, and
    what lies between is blended by `(original / wavelength - low) / (high - low)`.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies: torch.Tensor = 1.0 / (rope_theta(hf_config) ** exponent)
    if rope_type(hf_config) != "llama3":
        return frequencies
    factor, low, high, original = (
        float(_rope(hf_config)[name])
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    turns = original * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def shape_of(hf_config: Mapping[str, Any], *, tp: int) -> Shape:
    """Sizes that rules need, with the vocabulary padded to a multiple of `tp`."""
    heads = int(hf_config["num_attention_heads"])
    vocab_size = int(hf_config["vocab_size"])
    return Shape(
        heads=heads,
        kv_heads=int(hf_config.get("num_key_value_heads") or heads),
        head_dim=int(hf_config.get("head_dim") or hf_config["hidden_size"] // heads),
        hidden=int(hf_config["hidden_size"]),
        ffn=int(hf_config["intermediate_size"]),
        vocab_size=vocab_size,
        padded_vocab=vocab_size + (-vocab_size % tp),
        experts=experts_of(hf_config) if "moe_intermediate_size" in hf_config else 0,
        expert_ffn=int(hf_config.get("moe_intermediate_size") or 0),
    )


def rules_for(family: Family, layers: int, *, tied: bool, experts: int = 0) -> list[tuple[Rule, int | None]]:
    """Every (rule, layer) of a model in export order, names filled in; layer None outside the decoder layers."""
    table: list[tuple[Rule, int | None]] = [(rule, None) for rule in family.first]
    for layer in range(layers):
        plain = [rule for rule in family.layer if not rule.per_expert]
        each = [rule for rule in family.layer if rule.per_expert]
        table += [(rule.at(layer), layer) for rule in plain]
        table += [(rule.at(layer, expert), layer) for expert in range(experts) for rule in each]
    table += [(rule, None) for rule in family.last]
    if not tied:
        table.append((family.head, None))
    return table
