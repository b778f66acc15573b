"""`reward`: the terms whose weighted sum is the proxy reward, and the providers of the signals they need."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .base import Section, rule
from .named import NamedSection


class TermSection(NamedSection):
    """One reward term: its name, its weight, and the reward's own options beside them."""

    keeps = frozenset({"weight"})

    name: str
    """A registered reward; `urlvr rewards` lists them."""
    weight: float = 1.0
    """Weight in the sum."""
    normalize: bool = False
    """Scale the term to zero mean and unit deviation within its group before weighting."""

    @classmethod
    def named(cls, name: str) -> Any:
        """The reward's class."""
        from megatron_urlvr.rewards.registry import get_reward

        return get_reward(name)


class ProviderSection(NamedSection):
    """A provider of signals: its name, and its own options beside it."""

    name: str
    """`judge` (a model's verdicts), `votes` (somebody else's vote), `checker` (a task's own), `unit_tests`, or one from
    an entry point."""

    @classmethod
    def named(cls, name: str) -> Any:
        """The provider's class."""
        from megatron_urlvr.rewards import get_provider

        return get_provider(name)


class RewardSection(Section):
    terms: dict[str, TermSection] = Field(min_length=1)
    """Terms by label."""
    temperature: Literal["rollout"] | Annotated[float, Field(gt=0)] = "rollout"
    """Temperature of the token statistics; `rollout` is the sampling temperature, as in the released URLVR code."""
    judge: Literal["policy", "reference", "ema"] = "policy"
    """Whose token statistics certainty rewards are made of: the policy's as it is, its starting weights' or those of
    their moving average (`optim.ema_decay`), read on the policy's responses."""
    providers: dict[str, ProviderSection] = Field(default_factory=dict)
    """Providers of the signals that rewards need beyond token statistics and answers, by label."""
    statistics: Literal["trainer", "servers"] = "trainer"
    """Who computes the token statistics that rewards are made of. `servers`: the SGLang plug-in while it samples, so
    that the trainer's scoring pass is skipped; they are then those of the weights and the engine that sampled."""

    @rule("judge", "statistics")
    def _servers_hold_the_policy(self) -> str | None:
        if self.statistics == "servers" and self.judge != "policy":
            return (
                f"judge = {self.judge!r} with statistics = 'servers': servers compute the statistics of the policy's "
                "weights; set statistics=trainer, or judge=policy"
            )
        return None
