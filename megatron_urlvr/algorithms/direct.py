"""Direct minimisation: losses that are a statistic of the policy itself, with its gradient, instead of a policy
gradient of a reward.

They are the differentiable twins of the certainty rewards, and their controls: what the reward reaches by sampling,
these reach by descent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_urlvr.config.algorithm import (
    CISPOSection,
    DirectSection,
    GSPOSection,
    KLCovSection,
    KLSection,
    LossSection,
    RLSCSection,
)
from megatron_urlvr.types import TokenStats

from .kl import ESTIMATORS, KLName
from .losses import WEIGHT, LossInputs, PolicyLoss, build_loss, finished

Statistic = Literal["entropy", "self_certainty", "logp"]


@dataclass(frozen=True)
class DirectLoss:
    """`sign * sum_t weight_t * coefficient * statistic_t`, plus `kl_coef` times a KL estimate.

    - EM-FT (arXiv 2505.15134, eq. 2): `+ entropy`, coefficient 1
    - negative self-certainty: `- KL(U || p)`, coefficient 1
    - RLSC (arXiv 2506.06395, eq. 7): `- log p`, coefficient `p_old(y) + alpha`, with `p_old(y)` the response's
      probability when it was sampled

    The coefficient takes the advantage's place in `LossInputs`; weights are `token_weights`, so that the loss is a sum
    over micro-batches and ranks.
    """

    statistic: Statistic
    sign: float
    kl_coef: float
    kl_estimator: KLName
    alpha: float | None = None
    """RLSC's smoothing; None for a coefficient of 1."""

    @property
    def needs(self) -> frozenset[str]:
        """Statistics the forward has to give."""
        return frozenset({self.statistic, "logp"} if self.needs_reference else {self.statistic})

    @property
    def needs_reference(self) -> bool:
        """Whether `LossInputs.ref_logp` must be given."""
        return self.kl_coef > 0

    def upstream(self, inputs: LossInputs) -> dict[str, torch.Tensor] | None:
        """The gradient of the loss with respect to its statistic, `[R]`; None with a KL term, which is not linear."""
        if self.needs_reference:
            return None
        return {self.statistic: self.sign * inputs.weight * inputs.advantage}

    def coefficients(self, advantages: Sequence[float], logp: Sequence[torch.Tensor]) -> list[float]:
        """What each sample's tokens are multiplied by, from its log-probs when sampled (`[T]` each). Rewards and their
        advantages play no part."""
        if self.alpha is None:
            return [1.0] * len(logp)
        return [math.exp(float(each.double().sum())) + self.alpha for each in logp]

    def __call__(self, stats: TokenStats, inputs: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The micro-batch's share of the loss, a scalar with a gradient, and detached metric sums."""
        values, weight = stats.get(self.statistic), inputs.weight
        loss = direct = self.sign * (weight * inputs.advantage * values).sum()
        metrics = {"loss/direct": direct.detach(), WEIGHT: weight.sum()}
        if self.needs_reference:
            if inputs.ref_logp is None:
                raise ValueError(f"algorithm.kl.coef is {self.kl_coef}, but no reference log-probs were given")
            divergence = ESTIMATORS[self.kl_estimator](stats.get("logp"), inputs.ref_logp)
            penalty = self.kl_coef * (weight * divergence).sum()
            loss = direct + penalty
            metrics |= {"loss/kl": penalty.detach(), "kl/ref": (weight * divergence).sum().detach()}
        if stats.entropy is not None:
            metrics["train/entropy"] = (weight * stats.entropy).sum().detach()
        return loss, metrics

    def finish(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics of a mini-batch from their sums over all micro-batches and ranks."""
        return finished(sums)


PolicyLossSection = LossSection | GSPOSection | CISPOSection | KLCovSection


def build_objective(loss: PolicyLossSection | DirectSection | RLSCSection, kl: KLSection) -> PolicyLoss | DirectLoss:
    """The loss of `algorithm.loss` with `algorithm.kl`. A KL in the reward leaves no trace in it."""
    if isinstance(loss, PolicyLossSection):
        return build_loss(loss, kl)
    coef = kl.coef if kl.place == "loss" else 0.0
    if isinstance(loss, RLSCSection):
        return DirectLoss("logp", -1.0, coef, kl.estimator, alpha=loss.alpha)
    if loss.name == "em_ft":
        return DirectLoss("entropy", 1.0, coef, kl.estimator)
    return DirectLoss("self_certainty", -1.0, coef, kl.estimator)
