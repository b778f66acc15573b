"""Advantages from the rewards of groups: how much better each sample is than its siblings.

Every estimator takes `rewards: [G, n]` (G prompts, the n samples of each that are trained on) and returns `[G, n]`
float32. Most look at one row at a time, so the result does not depend on how prompts are spread over processes. Those
that normalise over the batch are given `total`, which sums a vector over all data-parallel replicas: with the number
of samples, their sum and their squared deviations from it, the result does not depend on the spread either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_urlvr.registry import Registry

STD_EPS = 1e-6
"""Added to the standard deviation, as veRL does. A group that deviates by less counts as having no signal: that is
the resolution of a float32 log-probability from logits of order 10, and dividing by it would magnify rounding, which
differs from layout to layout."""

Estimator = Callable[[torch.Tensor], torch.Tensor]
Total = Callable[[torch.Tensor], torch.Tensor]
"""Sums a float64 vector over the data-parallel replicas, each of which takes part once; collective."""
BatchEstimator = Callable[[torch.Tensor, Total], torch.Tensor]


def alone(values: torch.Tensor) -> torch.Tensor:
    """The total of one process: its own values."""
    return values


@dataclass(frozen=True)
class Advantage:
    """A named estimator; calling it applies it."""

    name: str
    estimate: Estimator | None
    """None where `over_batch` takes its place."""
    scale_free: bool
    """Multiplying one group's rewards by a positive number changes nothing (the epsilon aside)."""
    over_batch: BatchEstimator | None = None
    """What is asked where the batch of all replicas matters."""

    def __call__(self, rewards: torch.Tensor, total: Total = alone) -> torch.Tensor:
        """Advantages `[G, n]` float32. Every replica must call it where `over_batch` is set, also one with G = 0."""
        if rewards.ndim != 2 or rewards.shape[1] < 2:
            raise ValueError(
                f"advantage {self.name!r} compares the samples of a prompt and got rewards of shape "
                f"{tuple(rewards.shape)}; it needs [prompts, samples] with at least 2 samples "
                "(rollout.n_train, or rollout.n_votes where that is not set)"
            )
        if self.over_batch is not None:
            return self.over_batch(rewards, total)
        assert self.estimate is not None, f"advantage {self.name!r} has nothing to ask"
        return self.estimate(rewards)


_advantages: Registry[Advantage | Estimator] = Registry("advantage")


def get_advantage(name: str) -> Advantage:
    """The estimator called `name`. UnknownName if there is none.

    An entry point of the group `megatron_urlvr.advantage` is a function `[G, n] -> [G, n]`; it may carry an attribute
    `scale_free = True`.
    """
    found = _advantages.get(name)
    if isinstance(found, Advantage):
        return found
    return Advantage(name, found, scale_free=bool(getattr(found, "scale_free", False)))


def available() -> list[str]:
    """Names of all estimators, those of installed entry points included."""
    return _advantages.names()


def standardise(values: torch.Tensor) -> torch.Tensor:
    """`(x - mean) / (std + eps)` along the last axis, float64; 0 where std < eps or there is one value only.

    The standard deviation is the unbiased one (n - 1), as `torch.std` gives it to veRL and TRL. With the biased one of
    the GRPO paper the result is larger by sqrt(n / (n - 1)) for every group alike.
    """
    values = values.double()
    if values.shape[-1] < 2 or not len(values):
        return torch.zeros_like(values)
    std = values.std(dim=-1, keepdim=True, unbiased=True)
    scaled = (values - values.mean(dim=-1, keepdim=True)) / (std + STD_EPS)
    return torch.where(std < STD_EPS, torch.zeros_like(scaled), scaled)


def zero_variance(rewards: torch.Tensor) -> torch.Tensor:
    """Which groups have no signal: `[G]` bool for `rewards: [G, n]`. Such a group gives a zero gradient."""
    if rewards.shape[-1] < 2:
        return torch.ones(rewards.shape[:-1], dtype=torch.bool)
    return rewards.double().std(dim=-1, unbiased=True) < STD_EPS


def grpo(rewards: torch.Tensor) -> torch.Tensor:
    """`(r - mean) / (std + 1e-6)` (GRPO, arXiv 2402.03300, section 4.1.2), with the unbiased deviation."""
    return standardise(rewards).float()


def dr_grpo(rewards: torch.Tensor) -> torch.Tensor:
    """`r - mean`: GRPO without the deviation, which favours easy and hard prompts (Dr.GRPO, arXiv 2503.20783)."""
    rewards = rewards.double()
    return (rewards - rewards.mean(dim=-1, keepdim=True)).float()


def rloo(rewards: torch.Tensor) -> torch.Tensor:
    """`r_i - mean of the others` (RLOO, arXiv 2402.14740), which is n / (n - 1) times `r - mean`."""
    rewards = rewards.double()
    n = rewards.shape[-1]
    return ((rewards - rewards.mean(dim=-1, keepdim=True)) * (n / (n - 1))).float()


def zero(rewards: torch.Tensor) -> torch.Tensor:
    """0 for every sample: the control in which all runs as usual and no reward moves the policy."""
    return torch.zeros_like(rewards, dtype=torch.float32)


def batch_std(centred: torch.Tensor, total: Total) -> torch.Tensor:
    """Unbiased deviation over all samples of the batch, a float64 scalar, of values that its mean was taken from.

    Global totals: the number of samples and the sum of squares.
    """
    count, squares = total(
        torch.stack([torch.tensor(float(centred.numel()), dtype=torch.float64), centred.square().sum()])
    )
    return (squares / (count - 1).clamp(min=1)).sqrt()


def reinforce_pp(rewards: torch.Tensor, total: Total) -> torch.Tensor:
    """`(r - mean over the batch) / (deviation over the batch + 1e-6)` (REINFORCE++, arXiv 2501.03262, eq. 5; its KL
    penalty is `algorithm.kl` with `place: reward`). Zero where the whole batch has one reward.

    Global totals: the number of samples, the sum of rewards, and the sum of squared deviations.

    With every term `normalize: true` this is GDPO's last step (arXiv 2601.05242).
    """
    rewards = rewards.double()
    count, summed = total(torch.stack([torch.tensor(float(rewards.numel()), dtype=torch.float64), rewards.sum()]))
    return _scaled(rewards - summed / count.clamp(min=1), total)


def reinforce_pp_baseline(rewards: torch.Tensor, total: Total) -> torch.Tensor:
    """`(r - mean of the group) / (deviation of these over the batch + 1e-6)` (REINFORCE++-baseline, arXiv 2501.03262):
    the group's mean as baseline, the batch's scale.

    Global totals: the number of samples and the sum of squared differences, whose mean is zero by construction.
    """
    rewards = rewards.double()
    return _scaled(rewards - rewards.mean(dim=-1, keepdim=True), total)


def _scaled(centred: torch.Tensor, total: Total) -> torch.Tensor:
    std = batch_std(centred, total)
    return torch.zeros_like(centred).float() if float(std) < STD_EPS else (centred / (std + STD_EPS)).float()


def entropy_scaled(advantages: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
    """`A (1 + (mean H - H) / mean H)` (ETTRL, arXiv 2508.11356): sure responses weigh more, unsure ones less.

    `advantages`, `entropies`: `[G, n]`; H is a response's mean token entropy in nats, mean H that of its group. Returns
    float32. A group without any entropy is left as it is. One row at a time: nothing global is needed.
    """
    entropies = entropies.double()
    mean = entropies.mean(dim=-1, keepdim=True)
    factor = torch.where(mean > 0, 2 - entropies / mean.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
    return (advantages.double() * factor).float()


for _own in (
    Advantage("grpo", grpo, scale_free=True),
    Advantage("dr_grpo", dr_grpo, scale_free=False),
    Advantage("rloo", rloo, scale_free=False),
    Advantage("zero", zero, scale_free=True),
    Advantage("reinforce_pp", None, scale_free=False, over_batch=reinforce_pp),
    Advantage("reinforce_pp_baseline", None, scale_free=False, over_batch=reinforce_pp_baseline),
):
    _advantages.add(_own.name, _own)
