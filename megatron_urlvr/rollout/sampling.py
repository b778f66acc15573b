"""Sampling whose randomness belongs to the sample: the same draw whatever the batch, the order or the layout."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(z: np.ndarray) -> np.ndarray:
    """splitmix64's output function (Steele et al., OOPSLA 2014): every bit of `z` reaches every bit of the result."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample_seeds(seed: int, ids: Sequence[str], n: int) -> np.ndarray:
    """`[len(ids) * n]` uint64: one seed for each sample, from the run's seed, the prompt's id and the index."""
    base = [int.from_bytes(hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=8).digest(), "little") for i in ids]
    with np.errstate(over="ignore"):
        # Mixed once more: `uniforms` counts positions in the same steps, and samples must not share a sequence.
        return _mixed(np.array(base, dtype=np.uint64)[:, None] + np.arange(n, dtype=np.uint64) * _GOLDEN).reshape(-1)


def uniforms(seeds: np.ndarray, position: int) -> torch.Tensor:
    """`[N]` float64 in [0, 1): the draw of each sample at a token position (splitmix64, counter-based)."""
    with np.errstate(over="ignore"):
        z = _mixed(seeds + _GOLDEN * np.uint64(position + 1))
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) / float(1 << 53))


def pick(logits: torch.Tensor, draws: torch.Tensor, *, top_p: float = 1.0) -> torch.Tensor:
    """`[N]` tokens by inverse transform sampling from softmax(logits), `logits` `[N, V]` after temperature.

    With `top_p` below 1 only the smallest set of most likely tokens that holds `top_p` of the mass is drawn from.
    """
    probabilities = logits.softmax(-1, dtype=torch.float64)
    order = None
    if top_p < 1.0:
        probabilities, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    ladder = probabilities.cumsum(-1)
    # The draw is scaled by the total, so that rounding never leaves a gap at the top; `right=True` skips entries of
    # probability zero.
    chosen = torch.searchsorted(ladder, (draws.to(ladder.device) * ladder[:, -1])[:, None], right=True)
    chosen = chosen.clamp_(max=logits.shape[-1] - 1)
    return (chosen if order is None else order.gather(-1, chosen))[:, 0]
