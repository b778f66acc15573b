"""Small Qwen2 folders with weights that leave no term of the model at a trivial value, and what transformers says
about them in float64: the oracle that policy and engine are measured against."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

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
    fields: dict[str, Any] = {"rope_theta": 10000.0}  # where transformers 5 keeps it, its signature does not say
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
        use_sliding_window=False,
        **fields,
    )
    model = Qwen2ForCausalLM(config)
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
def hf_model(folder: Path, dtype: torch.dtype = torch.float64) -> Qwen2ForCausalLM:
    """The model of `folder` as transformers reads it; the same object at every call."""
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def hf_logits(model: Any, row: Row) -> torch.Tensor:
    """`[L, V]` logits that predict each response token of `row`, teacher-forced, this row alone."""
    ids = torch.tensor([[*row.prompt, *row.response]])
    return model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]


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
