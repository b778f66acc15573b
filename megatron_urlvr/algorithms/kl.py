"""Schulman's estimators of KL(policy || reference) from sampled tokens (http://joschu.net/blog/kl-approx.html).

With `d = log p(y) - log ref(y)` of a token sampled from p:

| name | value           | E[value]            | E[gradient], when it is a term of the loss |
|------|-----------------|---------------------|--------------------------------------------|
| k1   | d               | KL(p || ref)        | 0: as a loss it only adds noise            |
| k2   | d^2 / 2         | KL to second order  | that of KL(p || ref)                       |
| k3   | exp(-d) - 1 + d | KL(p || ref)        | that of KL(ref || p)                       |

So k1 belongs into the reward; in the loss k2 and k3 pull towards the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

KLName = Literal["k1", "k2", "k3"]
LOG_RATIO_BOUND = 20.0
"""Bound of |log ratio| before exp: beyond it, exp overflows float32 and 0 * inf turns gradients into NaN."""


def k1(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """`d`, per token `[R]`, nats. Unbiased, of either sign."""
    return logp - ref_logp


def k2(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """`d^2 / 2`, per token `[R]`, nats. Biased, never negative."""
    return 0.5 * (logp - ref_logp) ** 2


def k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """`exp(-d) - 1 + d`, per token `[R]`, nats. Unbiased, never negative. `d` is bounded to +-20 before."""
    back = torch.clamp(ref_logp - logp, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return torch.expm1(back) - back


ESTIMATORS: dict[KLName, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def reward_penalty(logp: Sequence[torch.Tensor], ref_logp: Sequence[torch.Tensor], estimator: KLName) -> torch.Tensor:
    """Estimated KL of each response to the reference, summed over its tokens: what `kl.place: reward` takes from the
    rewards, times `kl.coef`, before the advantage.

    `logp`, `ref_logp`: one `[T_i]` tensor for each sample. Returns `[n]` float64 on the CPU. A sum and not a mean:
    with k1 it is the log-ratio of the whole responses, whose expectation is their KL.
    """
    k = ESTIMATORS[estimator]
    return torch.stack(
        [k(p.detach().double(), q.detach().double()).sum().cpu() for p, q in zip(logp, ref_logp, strict=True)]
    )
