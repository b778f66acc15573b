"""The model families this program trains: how a Hugging Face config and its tensors map to Megatron-Core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...exit_codes import UnusableInput
from .rules import Rule, Shape, gated, qkv, same, vocab

_ATTENTION = "decoder.layers.{l}.self_attention."
_MLP = "decoder.layers.{l}.mlp."
_HF = "model.layers.{l}."


@dataclass(frozen=True)
class Family:
    """One architecture: Megatron parameters of the embedding, of each layer, and of the head."""

    architecture: str
    """`architectures[0]` of config.json."""
    qkv_bias: bool
    first: tuple[Rule, ...]
    layer: tuple[Rule, ...]
    last: tuple[Rule, ...]
    head: Rule
    """The output table, absent from the folder when embeddings are tied."""


QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    qkv_bias=True,
    first=(vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight"),),
    layer=(
        same("decoder.layers.{l}.input_layernorm.weight", _HF + "input_layernorm.weight"),
        qkv(_ATTENTION + "linear_qkv.weight", *(f"{_HF}self_attn.{x}_proj.weight" for x in "qkv")),
        qkv(_ATTENTION + "linear_qkv.bias", *(f"{_HF}self_attn.{x}_proj.bias" for x in "qkv")),
        same(_ATTENTION + "linear_proj.weight", _HF + "self_attn.o_proj.weight", "columns"),
        same("decoder.layers.{l}.pre_mlp_layernorm.weight", _HF + "post_attention_layernorm.weight"),
        gated(_MLP + "linear_fc1.weight", _HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        same(_MLP + "linear_fc2.weight", _HF + "mlp.down_proj.weight", "columns"),
    ),
    last=(same("decoder.final_layernorm.weight", "model.norm.weight"),),
    head=vocab("output_layer.weight", "lm_head.weight"),
)

FAMILIES: Mapping[str, Family] = {QWEN2.architecture: QWEN2}

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
"""What a config.json must give as whole numbers."""

# Transformer Engine fuses a norm into the projection behind it and stores its weight there.
TRANSFORMER_ENGINE_NAMES: Mapping[str, str] = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def family_of(hf_config: Mapping[str, Any], folder: str) -> Family:
    """The family of a config.json; UnusableInput names the folder, what was found and what is supported."""
    names = hf_config.get("architectures") or ["(none)"]
    family = FAMILIES.get(names[0])
    if family is None:
        raise UnusableInput(
            f"model.path = {folder}: architecture {names[0]!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    if missing := [name for name in SIZES if not isinstance(hf_config.get(name), int)]:
        raise UnusableInput(f"model.path = {folder}: its config.json does not say {', '.join(missing)}")
    act = hf_config.get("hidden_act", "silu")
    if act != "silu":
        raise UnusableInput(f"model.path = {folder}: hidden_act = {act!r}; supported: silu")
    if hf_config.get("use_sliding_window"):
        raise UnusableInput(f"model.path = {folder}: use_sliding_window = true is not supported; set it to false")
    if rope_type(hf_config) != "default":
        raise UnusableInput(f"model.path = {folder}: rope type {rope_type(hf_config)!r}; supported: default")
    return family


def rope_type(hf_config: Mapping[str, Any]) -> str:
    """Kind of rotary scaling; `default` is none."""
    scaling = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def rope_theta(hf_config: Mapping[str, Any]) -> float:
    """Rotary base: top-level in older config.json files, under `rope_parameters` in newer ones."""
    parameters = hf_config.get("rope_parameters") or {}
    return float(parameters.get("rope_theta") or hf_config.get("rope_theta") or 10000.0)


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
    )


def rules_for(family: Family, layers: int, *, tied: bool) -> list[tuple[Rule, int | None]]:
    """Every (rule, layer) of a model in export order; layer None outside the decoder layers."""
    table: list[tuple[Rule, int | None]] = [(rule, None) for rule in family.first]
    table += [(rule, layer) for layer in range(layers) for rule in family.layer]
    table += [(rule, None) for rule in family.last]
    if not tied:
        table.append((family.head, None))
    return table
