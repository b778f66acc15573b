"""`model`: the policy's starting weights and numerics."""

from typing import Literal

from pydantic import Field

from .base import Section


class ModelSection(Section):
    path: str = Field(min_length=1)
    """A Hugging Face folder: config.json, safetensors and a tokenizer."""
    vocab: Literal["config", "tokenizer"] = "config"
    """Which entries count in sampler and statistics: `config` all of the HF config's `vocab_size`, `tokenizer` only
    the tokenizer's own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Parameter and activation type. `auto`: bfloat16 on CUDA, float32 on CPU."""
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    """Layers' matrix products in 8 bits, by Transformer Engine with a scale for each tensor: `e4m3` throughout,
    `hybrid` with e5m2 gradients. Weights, statistics head and optimizer stay as they are. Needs a GPU that has it (Ada,
    Hopper or newer)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the update step."""
