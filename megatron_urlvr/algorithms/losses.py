"""The policy loss of one micro-batch, as a sum that needs no rescaling afterwards.

Each token's share in the global mean is decided before the first forward (`token_weights`), from totals over all
data-parallel ranks and the whole mini-batch. So the sum of the losses, of the metrics and of the gradients over
micro-batches and ranks is the global value, however the samples were spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from megatron_urlvr.config.algorithm import CISPOSection, GSPOSection, KLCovSection, KLSection, LossSection
from megatron_urlvr.types import TokenStats

from .kl import ESTIMATORS, LOG_RATIO_BOUND, KLName

Aggregation = Literal["token_mean", "sequence_mean", "fixed_length"]


def token_weights(
    lengths: torch.Tensor,
    aggregation: Aggregation,
    *,
    total_tokens: int,
    total_sequences: int,
    max_new_tokens: int,
) -> torch.Tensor:
    """Weight of every response token, `[R]` float32 on the device of `lengths: [N]`, sample after sample.

    The totals are global: response tokens and responses of the whole mini-batch, over all data-parallel ranks.

    - `token_mean`: `1 / total_tokens` (DAPO, arXiv 2503.14476; veRL's default)
    - `sequence_mean`: `1 / (length * total_sequences)` (GRPO, arXiv 2402.03300, eq. 3)
    - `fixed_length`: `1 / (max_new_tokens * total_sequences)` (Dr.GRPO, arXiv 2503.20783)
    """
    lengths = lengths.to(torch.int64)
    if aggregation == "token_mean":
        each = torch.full_like(lengths, 1, dtype=torch.float64) / max(total_tokens, 1)
    elif aggregation == "sequence_mean":
        each = 1.0 / (lengths.double().clamp(min=1) * max(total_sequences, 1))
    elif aggregation == "fixed_length":
        each = torch.full_like(lengths, 1, dtype=torch.float64) / (max_new_tokens * max(total_sequences, 1))
    else:
        raise ValueError(f"aggregation is {aggregation!r}; it must be token_mean, sequence_mean or fixed_length")
    return torch.repeat_interleave(each, lengths).float()


@dataclass(frozen=True)
class LossInputs:
    """The response tokens of one micro-batch laid end to end: `[R]` float32 each, none with a gradient."""

    advantage: torch.Tensor
    """The advantage of the token's sample."""
    weight: torch.Tensor
    """The token's share in the global mean, from `token_weights`; 0 for padding."""
    old_logp: torch.Tensor | None = None
    """Log-probability under the policy that sampled, nats. None: that is the policy being differentiated."""
    ref_logp: torch.Tensor | None = None
    """Log-probability under the reference, nats; for a KL term in the loss."""
    lengths: Sequence[int] | None = None
    """Tokens of each response, in order; for losses that see whole responses."""
    held: torch.Tensor | None = None
    """1 on the tokens that KL-Cov holds, 0 on the others; from `covariance.held_tokens`."""


def log_ratio(logp: torch.Tensor, old_logp: torch.Tensor | None) -> torch.Tensor:
    """`log p - log p_old` per token `[R]`, bounded to +-20 so that exp stays finite, in its gradient too.

    Without `old_logp` it is zero in value and has the gradient of `logp`.
    """
    if old_logp is None:
        return logp - logp.detach()
    return torch.clamp(logp - old_logp, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)


@dataclass(frozen=True)
class Clipped:
    """The clipped surrogate of each token, `[R]`; the two masks are bool."""

    loss: torch.Tensor
    clipped: torch.Tensor
    """The ratio's bounds cut the gradient off."""
    dual: torch.Tensor
    """The bound of dual clip did."""


def ppo_clip(
    ratio: torch.Tensor,
    advantage: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Clipped:
    """`max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high))` per token (PPO, arXiv 1707.06347, eq. 7; separate bounds:
    DAPO, arXiv 2503.14476), and for A < 0 at most `-A dual_clip` (dual clip, arXiv 1912.09729)."""
    free = -advantage * ratio
    bounded = -advantage * torch.clamp(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = torch.maximum(free, bounded)
    clipped = bounded > free
    dual = torch.zeros_like(clipped)
    if dual_clip is not None:
        limit = -advantage * dual_clip
        dual = (advantage < 0) & (loss > limit)
        loss = torch.where(dual, limit, loss)
    return Clipped(loss=loss, clipped=clipped, dual=dual)


def sequence_ratio(difference: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """GSPO's ratio (arXiv 2507.18071, eqs. 7 and 14) at every token: `exp(mean over its response of difference)` in
    value, with the gradient of the token's own log-prob.

    `difference: [R]`, log p - log p_old. With the same advantage on all tokens of a response and weights 1 / length the
    gradient is that of the response's ratio itself. ValueError where lengths and tokens do not agree.
    """
    if sum(lengths) != len(difference):
        raise ValueError(f"responses of {sum(lengths)} tokens in all, and log-probs of {len(difference)}")
    sizes = torch.tensor(list(lengths), dtype=torch.int64, device=difference.device)
    if not len(sizes):
        return difference.exp()
    means = torch.segment_reduce(difference.detach().double(), "mean", lengths=sizes)
    whole = torch.repeat_interleave(means, sizes).to(difference.dtype)
    return torch.exp(whole) * torch.exp(difference - difference.detach())


def cispo(
    logp: torch.Tensor, ratio: torch.Tensor, advantage: torch.Tensor, *, clip_low: float, clip_high: float
) -> Clipped:
    """`-A clamp(r, 1 - clip_low, 1 + clip_high) log p`, the clamped ratio without a gradient (CISPO, MiniMax-M1, arXiv
    2506.13585, eq. 4). `clipped` marks the tokens whose weight a bound decides: they keep their gradient."""
    free = ratio.detach()
    bounded = free.clamp(1.0 - clip_low, 1.0 + clip_high)
    return Clipped(-advantage * bounded * logp, bounded != free, torch.zeros_like(bounded, dtype=torch.bool))


def kl_cov(difference: torch.Tensor, advantage: torch.Tensor, held: torch.Tensor, *, coef: float) -> Clipped:
    """`-A r`, plus `coef |log p - log p_old|` on the `held` tokens (KL-Cov, arXiv 2505.22617, eq. 12). `clipped` marks
    those."""
    loss = -advantage * torch.exp(difference) + coef * held * difference.abs()
    return Clipped(loss, held > 0, torch.zeros_like(held, dtype=torch.bool))


MEANS = frozenset(
    {
        "policy/clip_fraction",
        "policy/dual_clip_fraction",
        "policy/approx_kl",
        "policy/ratio",
        "train/entropy",
        "kl/ref",
    }
)
"""Metrics that `PolicyLoss.finish` divides by the summed weight."""
WEIGHT = "policy/weight"


Surrogate = Literal["ppo_clip", "gspo", "cispo", "kl_cov"]


@dataclass(frozen=True)
class PolicyLoss:
    """A policy gradient, clipped or held in the way of its `surrogate`, plus `kl_coef` times a KL estimate.

    Calling it returns the micro-batch's share of the global loss, a scalar with a gradient, and detached metrics that
    are sums too: `loss/policy`, `loss/kl`, and weighted sums of the `MEANS`. Add the metrics up over micro-batches and
    ranks, then let `finish` divide.
    """

    clip_low: float
    clip_high: float
    dual_clip: float | None
    aggregation: Aggregation
    kl_coef: float
    kl_estimator: KLName
    surrogate: Surrogate = "ppo_clip"
    cov_share: float = 0.0
    """Share of the mini-batch's tokens that KL-Cov holds."""
    cov_coef: float = 0.0
    """Weight of KL-Cov's penalty on them."""
    needs: frozenset[str] = field(default=frozenset({"logp"}))
    """Statistics the forward has to give. `entropy` is reported when it is there."""

    @property
    def needs_reference(self) -> bool:
        """Whether `LossInputs.ref_logp` must be given."""
        return self.kl_coef > 0

    def __call__(self, stats: TokenStats, inputs: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`stats`: statistics of the R response tokens, `logp` with a gradient. ValueError where shapes differ, or the
        reference is wanted and absent."""
        logp, weight = stats.get("logp"), inputs.weight
        self._check(logp, inputs)
        difference = log_ratio(logp, inputs.old_logp)
        ratio = torch.exp(difference)
        surrogate = self._surrogate(logp, difference, ratio, inputs)
        loss = policy = (weight * surrogate.loss).sum()
        per_token = {
            "policy/clip_fraction": surrogate.clipped,
            "policy/dual_clip_fraction": surrogate.dual,
            "policy/approx_kl": ratio - 1.0 - difference,  # k3 of KL(old || policy), never negative
            "policy/ratio": ratio,
        }
        metrics = {"loss/policy": policy.detach()}
        if self.needs_reference:
            reference = logp.detach() if inputs.ref_logp is None else inputs.ref_logp  # None only without tokens
            divergence = ESTIMATORS[self.kl_estimator](logp, reference)
            penalty = self.kl_coef * (weight * divergence).sum()
            loss = policy + penalty
            metrics["loss/kl"] = penalty.detach()
            per_token["kl/ref"] = divergence
        if stats.entropy is not None:
            per_token["train/entropy"] = stats.entropy
        with torch.no_grad():
            metrics |= {name: (weight * values).sum() for name, values in per_token.items()}
            metrics[WEIGHT] = weight.sum()
        return loss, metrics

    def _surrogate(
        self, logp: torch.Tensor, difference: torch.Tensor, ratio: torch.Tensor, inputs: LossInputs
    ) -> Clipped:
        bounds = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        if self.surrogate == "cispo":
            return cispo(logp, ratio, inputs.advantage, **bounds)
        if self.surrogate == "kl_cov":
            held = torch.zeros_like(ratio) if inputs.held is None else inputs.held
            return kl_cov(difference, inputs.advantage, held, coef=self.cov_coef)
        if self.surrogate == "gspo":
            if inputs.lengths is None:
                raise ValueError("gspo takes one ratio for a response and was not told where responses end")
            ratio = sequence_ratio(difference, inputs.lengths)
        return ppo_clip(ratio, inputs.advantage, **bounds, dual_clip=self.dual_clip)

    def upstream(self, inputs: LossInputs) -> dict[str, torch.Tensor] | None:
        """The gradient of the loss with respect to `logp`, `[R]`, where it is known before the forward: strictly
        on-policy the ratio is 1, no clip is active, and it is `-weight * advantage`. None otherwise."""
        if inputs.old_logp is not None or self.needs_reference:
            return None
        return {"logp": -inputs.weight * inputs.advantage}

    def coefficients(self, advantages: Sequence[float], logp: Sequence[torch.Tensor]) -> list[float]:
        """What each sample's tokens are multiplied by: its advantage."""
        return list(advantages)

    def finish(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics of a mini-batch from their sums over all micro-batches and ranks.

        The weights of `token_mean` and `sequence_mean` sum to one; those of `fixed_length` do not, so that the means
        must be divided. Losses stay as they are.
        """
        return finished(sums)

    def _check(self, logp: torch.Tensor, inputs: LossInputs) -> None:
        given = {"advantage": inputs.advantage, "weight": inputs.weight}
        given |= {"old_logp": inputs.old_logp} if inputs.old_logp is not None else {}
        given |= {"ref_logp": inputs.ref_logp} if inputs.ref_logp is not None else {}
        if wrong := [f"{name} {tuple(value.shape)}" for name, value in given.items() if value.shape != logp.shape]:
            raise ValueError(f"the loss has log-probs of shape {tuple(logp.shape)} but {', '.join(wrong)}; one a token")
        if self.needs_reference and inputs.ref_logp is None and logp.numel():
            raise ValueError(
                f"algorithm.kl.coef is {self.kl_coef} with place: loss, but no reference log-probs were given; "
                "score the batch under the reference weights first, or set algorithm.kl.coef to 0"
            )


def finished(sums: Mapping[str, float]) -> dict[str, float]:
    """Metric sums of a mini-batch with the `MEANS` divided by the summed weight."""
    total = sums.get(WEIGHT, 0.0)
    return {
        name: value / total if name in MEANS and total > 0 else value for name, value in sums.items() if name != WEIGHT
    }


def build_loss(loss: LossSection | GSPOSection | CISPOSection | KLCovSection, kl: KLSection) -> PolicyLoss:
    """The policy gradient of `algorithm.loss` with `algorithm.kl`. A KL in the reward leaves no trace in it."""
    coef = kl.coef if kl.place == "loss" else 0.0
    if isinstance(loss, KLCovSection):
        return PolicyLoss(
            0.0, 0.0, None, loss.aggregation, coef, kl.estimator, "kl_cov", cov_share=loss.share, cov_coef=loss.coef
        )
    dual = None if isinstance(loss, CISPOSection) else loss.dual_clip
    surrogate: Surrogate = (
        "gspo" if isinstance(loss, GSPOSection) else "cispo" if isinstance(loss, CISPOSection) else "ppo_clip"
    )
    return PolicyLoss(loss.clip_low, loss.clip_high, dual, loss.aggregation, coef, kl.estimator, surrogate)
