"""The values the kernels return, and the names they are asked for by."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

DIFFERENTIABLE = ("logp", "entropy", "self_certainty", "lse")
"""Statistics that carry a gradient to the hidden states and the weight (or to the logits)."""

OUTPUTS = (*DIFFERENTIABLE, "top2_gap", "max_prob", "argmax")
"""Everything `outputs` may name."""

IGNORED = -100
"""Target of a row that counts nowhere: its statistics are 0 (its argmax -1), whatever its hidden state holds."""


@dataclass
class TokenStats:
    """Statistics of each row's distribution `p = softmax(z)`, `z` the logits over temperature, `V` the real vocabulary.

    `[T]` each, float32 (float64 for float64 inputs), natural logarithms; None where not asked for:

    - `logp = z[target] - lse`, nats
    - `entropy = -sum p log p`, nats
    - `self_certainty = KL(U || p) = lse - mean(z) - log V`, nats (Kang et al. 2025, arXiv 2502.18581, eq. 7)
    - `lse = log sum exp z`, nats
    - `top2_gap = p_(1) - p_(2)`, largest minus second largest probability
    - `max_prob = p_(1)`
    - `argmax`: global id of the largest logit, int64; the lowest id where several are equal

    `loss` is set by the one-pass form alone: `sum_t sum_k upstream[k][t] * k[t]`, a scalar to call `backward` on.
    """

    logp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    self_certainty: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    top2_gap: torch.Tensor | None = None
    max_prob: torch.Tensor | None = None
    argmax: torch.Tensor | None = None
    loss: torch.Tensor | None = None

    def present(self) -> frozenset[str]:
        """Names of the statistics that were computed."""
        return frozenset(f.name for f in fields(self) if f.name != "loss" and getattr(self, f.name) is not None)
