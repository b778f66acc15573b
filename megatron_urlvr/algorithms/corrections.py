"""Off-policy corrections: how much a token counts that other weights, or another engine, sampled.

With `log p` the trainer's log-probability of a sampled token before the step's first update, `log mu` the engine's when
it was sampled, `r_t = exp(log p - log mu)` and `R = exp(mean_t(log p - log mu))` over the response:

| method     | weight of token t                   | source                                              |
|------------|-------------------------------------|-----------------------------------------------------|
| `truncate` | min(r_t, high)                      | truncated importance sampling (IMPALA, 1802.01561)  |
| `mask`     | r_t if low <= r_t <= high, else 0   | IcePop (Ring-1T, 2510.18855)                        |
| `sequence` | min(R, high)                        | geometric mean: GSPO's ratio (2507.18071)           |
| `reject`   | 1 if low <= R <= high, else 0       | whole responses are kept or given up                |

A weight multiplies the advantage of its token; it has no gradient. The loss's denominators stay those of
`losses.token_weights` (all response tokens, or all responses, of the mini-batch over all ranks): a token of weight 0
counts there as one whose gradient is zero. So weights need nothing but their own response, and the sum of losses and
gradients does not depend on how responses are spread over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch

from megatron_urlvr.config.algorithm import CorrectionSection

from .kl import LOG_RATIO_BOUND


def log_ratios(logp: torch.Tensor, behaviour: torch.Tensor) -> torch.Tensor:
    """`log p - log mu` per token, float64 on the CPU, bounded to +-20. ValueError where shapes differ."""
    if logp.shape != behaviour.shape:
        raise ValueError(
            f"{tuple(logp.shape)} log-probs of the trainer and {tuple(behaviour.shape)} of the engine: one each a token"
        )
    difference = logp.detach().to("cpu", torch.float64) - behaviour.detach().to("cpu", torch.float64)
    return difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def weights(log_ratio: torch.Tensor, section: CorrectionSection) -> torch.Tensor:
    """Weights of one response's tokens, `[T]` float32, from its `log_ratio: [T]`; see the table above.

    ValueError for `method: none`: without a method there is nothing to weigh.
    """
    if section.method in ("truncate", "mask"):
        ratio = log_ratio.double().exp()
        if section.method == "truncate":
            return ratio.clamp(max=section.high).float()
        inside = (ratio >= section.low) & (ratio <= section.high)
        return torch.where(inside, ratio, torch.zeros_like(ratio)).float()
    mean = log_ratio.double().mean().exp() if len(log_ratio) else log_ratio.new_ones((), dtype=torch.float64)
    if section.method == "sequence":
        return mean.clamp(max=section.high).expand(len(log_ratio)).float()
    if section.method == "reject":
        return ((mean >= section.low) & (mean <= section.high)).expand(len(log_ratio)).float()
    raise ValueError(f"algorithm.correction.method is {section.method!r}: there are no weights without a method")


@dataclass(frozen=True)
class Mismatch:
    """How far trainer and engine are apart on some tokens: totals that add up over ranks, whatever rank has which."""

    tokens: float = 0.0
    absolute: float = 0.0
    """Sum of |log p - log mu|, nats."""
    largest: float = 0.0
    """Largest of them."""
    backward: float = 0.0
    """Sum of log mu - log p, nats: over the tokens its expectation is KL(mu || p)."""
    ratio: float = 0.0
    """Sum of r."""
    square: float = 0.0
    """Sum of r^2."""

    def __add__(self, other: Mismatch) -> Mismatch:
        both = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Mismatch(**{name: max(a, b) if name == "largest" else a + b for name, a, b in both})

    def metrics(self) -> dict[str, float]:
        """`mismatch/logp_abs_diff` and `mismatch/logp_max_diff` (nats), `mismatch/kl` (KL(mu || p) a token, nats), and
        `mismatch/ess`: the effective sample size `(sum r)^2 / (tokens * sum r^2)`, 1 where all ratios are equal.
        Empty without tokens."""
        if not self.tokens:
            return {}
        return {
            "mismatch/logp_abs_diff": self.absolute / self.tokens,
            "mismatch/logp_max_diff": self.largest,
            "mismatch/kl": self.backward / self.tokens,
            "mismatch/ess": self.ratio**2 / (self.tokens * self.square),
        }


def mismatch(log_ratio: Iterable[torch.Tensor]) -> Mismatch:
    """Totals over responses, from the `log_ratios` of each."""
    pieces = list(log_ratio)
    flat = torch.cat([torch.zeros(0, dtype=torch.float64), *pieces])
    if not len(flat):
        return Mismatch()
    ratio = flat.exp()
    return Mismatch(
        tokens=float(len(flat)),
        absolute=float(flat.abs().sum()),
        largest=float(flat.abs().max()),
        backward=float(-flat.sum()),
        ratio=float(ratio.sum()),
        square=float((ratio * ratio).sum()),
    )


def weight_totals(found: Sequence[torch.Tensor], section: CorrectionSection) -> dict[str, tuple[float, float]]:
    """(sum, tokens) of `correction/weight`, `correction/capped` (at the upper bound of `truncate` or `sequence`) and
    `correction/zero`, from the weights of each response. They add up over ranks; the metric is their quotient."""
    flat = torch.cat([torch.zeros(0), *found]).double()
    tokens = float(len(flat))
    totals = {
        "correction/weight": (float(flat.sum()), tokens),
        "correction/zero": (float((flat == 0).sum()), tokens),
    }
    if section.method in ("truncate", "sequence"):
        totals["correction/capped"] = (float((flat >= section.high).sum()), tokens)
    return totals
