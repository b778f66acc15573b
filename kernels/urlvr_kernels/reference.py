"""The oracle: statistics from whole logits in plain torch, differentiable by autograd. For tests and accuracy tables.

Give float64 tensors for a reference that float32 results can be measured against. Nothing here is tiled or fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .stats import IGNORED, TokenStats


def logits_stats(
    logits: torch.Tensor,
    target: torch.Tensor | None,
    *,
    temperature: float | torch.Tensor = 1.0,
    vocab_size: int | None = None,
    outputs: Sequence[str] = ("logp", "entropy", "self_certainty"),
) -> TokenStats:
    """Statistics of whole rows of logits `[T, V]`; see `urlvr_kernels.logits_stats` for the arguments."""
    size = logits.shape[1] if vocab_size is None else vocab_size
    ignored = None if target is None else target == IGNORED
    z = logits[:, :size]
    if ignored is not None:
        z = torch.where(ignored[:, None], 0.0, z)
    z = z / (temperature[:, None] if isinstance(temperature, torch.Tensor) and temperature.dim() else temperature)
    lse = torch.logsumexp(z, -1)
    log_p = z - lse[:, None]
    p = log_p.exp()
    ranked = p.topk(min(2, size), dim=-1).values
    found = {
        "entropy": -torch.where(p > 0, p * log_p, 0.0).sum(-1),
        "self_certainty": lse - z.mean(-1) - math.log(size),
        "lse": lse,
        "top2_gap": (ranked[:, 0] - (ranked[:, 1] if size > 1 else 0.0)).detach(),
        "max_prob": ranked[:, 0].detach(),
    }
    if target is not None:
        found["logp"] = log_p.gather(1, target.clamp_min(0)[:, None].long())[:, 0]
    if ignored is not None:
        found = {name: torch.where(ignored, 0.0, value) for name, value in found.items()}
    found["argmax"] = z.argmax(-1) if ignored is None else torch.where(ignored, -1, z.argmax(-1))
    return TokenStats(**{name: found[name] for name in outputs})


def lm_head_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor | None,
    *,
    temperature: float | torch.Tensor = 1.0,
    vocab_size: int | None = None,
    outputs: Sequence[str] = ("logp", "entropy", "self_certainty"),
) -> TokenStats:
    """Statistics of `hidden @ weight.T`, hidden `[T, H]`, weight `[V, H]` (the whole vocabulary, on one rank)."""
    if target is not None:
        hidden = torch.where((target == IGNORED)[:, None], 0.0, hidden)
    return logits_stats(hidden @ weight.T, target, temperature=temperature, vocab_size=vocab_size, outputs=outputs)
