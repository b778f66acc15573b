"""Advantages from the rewards of groups: how much better each sample is than its siblings.

Every estimator takes `rewards: [G, n]` (G prompts, the n samples of each that are trained on) and returns `[G, n]`
float32. It looks at one row at a time, so the result does not depend on how prompts are spread over processes.
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


@dataclass(frozen=True)
class Advantage:
    """A named estimator; calling it applies it."""

    name: str
    estimate: Estimator
    scale_free: bool
    """Multiplying one group's rewards by a positive number changes nothing (the epsilon aside)."""

    def __call__(self, rewards: torch.Tensor) -> torch.Tensor:
        if rewards.ndim != 2 or rewards.shape[1] < 2:
            raise ValueError(
                f"advantage {self.name!r} compares the samples of a prompt and got rewards of shape "
                f"{tuple(rewards.shape)}; it needs [prompts, samples] with at least 2 samples "
                "(rollout.n_train, or rollout.n_votes where that is not set)"
            )
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
    if values.shape[-1] < 2:
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


for _own in (
    Advantage("grpo", grpo, scale_free=True),
    Advantage("dr_grpo", dr_grpo, scale_free=False),
    Advantage("rloo", rloo, scale_free=False),
):
    _advantages.add(_own.name, _own)
