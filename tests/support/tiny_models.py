"""Small model folders with weights that leave no term of the model at a trivial value, and what transformers says
about them in float64: the oracle that policy and engine are measured against."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_urlvr.data.tasks import get_task
from megatron_urlvr.data.tokenizer import save_tokenizer
from megatron_urlvr.policy.batch import Row

Stats = dict[str, torch.Tensor]


def write_qwen2(
    folder: Path,
    *,
    tied: bool = False,
    vocab_size: int = 29,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
    tokenizer: bool = True,
) -> Path:
    """A model folder; norm weights are not 1, biases are not 0, and no two heads are alike.

    With `tokenizer` the folder has the 21-entry tokenizer of chain_sum, smaller than the model's vocabulary.
    """
    config = Qwen2Config(
        **_sizes(vocab_size, heads, kv_heads), num_hidden_layers=layers, tie_word_embeddings=tied, **_ROPE
    )
    return _write(config, folder, seed=seed, tokenizer=tokenizer)


FAMILIES = ("qwen2", "qwen3", "llama2", "llama3", "qwen3_moe")
"""What `write_family` can write; all but the last are dense."""
_ROPE: dict[str, Any] = {"rope_theta": 10000.0}  # where transformers 5 keeps it, its signatures do not say


def write_family(folder: Path, name: str, *, layers: int = 2, tied: bool = False) -> Path:
    """A folder of any family: head_dim apart from hidden / heads where the family allows it, and for Llama 3 a rotary
    scaling that stretches some wavelengths, blends some and leaves some within this model's positions."""
    common: dict[str, Any] = {
        **_sizes(29, heads=4, kv_heads=2),
        "num_hidden_layers": layers,
        "tie_word_embeddings": tied,
    }
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config: PreTrainedConfig
    if name == "qwen2":
        config = Qwen2Config(**common, **_ROPE)
    elif name == "qwen3":
        config = Qwen3Config(**common, head_dim=16, **_ROPE)
    elif name == "llama2":
        config = LlamaConfig(**{**common, "num_key_value_heads": 4}, **_ROPE)
    elif name == "llama3":
        config = LlamaConfig(**common, rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **scaling})
    else:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
        config = Qwen3MoeConfig(**common, head_dim=16, **experts, **_ROPE)
    return _write(config, folder, seed=11)


def _sizes(vocab: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }


def _write(config: PreTrainedConfig, folder: Path, *, seed: int, tokenizer: bool = True) -> Path:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(0.15 * noise if "embed" not in name else 0.5 * noise)
    model.save_pretrained(folder)
    if tokenizer:
        save_tokenizer(get_task("chain_sum").tokenizer(), folder)
    return folder


@functools.cache
def hf_model(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The model of `folder` as transformers reads it; the same object at every call."""
    slow = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **slow).eval()


def hf_logits(model: Any, row: Row) -> torch.Tensor:
    """`[L, V]` logits that predict each response token of `row`, teacher-forced, this row alone; on the CPU."""
    ids = torch.tensor([[*row.prompt, *row.response]], device=model.device)
    return model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].cpu()


def stats_of_logits(logits: torch.Tensor, response: Sequence[int]) -> Stats:
    """Token statistics by their definitions, in the type of `logits`."""
    p = logits.softmax(-1)
    uniform = torch.full_like(logits, 1 / logits.shape[-1])
    ranked = p.sort(-1, descending=True).values
    return {
        "logp": p.log().gather(1, torch.tensor(list(response))[:, None])[:, 0],
        "entropy": -torch.special.xlogy(p, p).sum(-1),
        "self_certainty": (uniform * (uniform.log() - p.log())).sum(-1),
        "top2_gap": ranked[:, 0] - ranked[:, 1],
        "lse": logits.exp().sum(-1).log(),
    }


def oracle_stats(model: Any, row: Row, *, temperature: float = 1.0, vocab: int | None = None) -> Stats:
    """Statistics of every response token of `row` under transformers' own forward."""
    with torch.no_grad():
        return stats_of_logits(hf_logits(model, row)[:, :vocab] / temperature, row.response)


def random_rows(count: int, *, vocab: int, seed: int = 0, prompts: int = 3, longest: int = 9) -> list[Row]:
    """Rows of a few prompts of different lengths, responses of 1 to `longest` tokens; the first has a single token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    texts = [tuple(draw(0, vocab) for _ in range(draw(2, 8))) for _ in range(prompts)]
    lengths = [1, *(draw(1, longest + 1) for _ in range(count - 1))]
    return [Row(texts[draw(0, prompts)], [draw(0, vocab) for _ in range(n)]) for n in lengths]
