"""`reward`: the terms whose weighted sum is the proxy reward, and the providers of the signals they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .base import Section, rule


class TermSection(Section):
    """One reward term: its name, its weight, and the reward's own options beside them."""

    model_config = ConfigDict(extra="allow")

    name: str
    """A registered reward; `urlvr rewards` lists them."""
    weight: float = 1.0
    """Weight in the sum."""
    normalize: bool = False
    """Scale the term to zero mean and unit deviation within its group before weighting."""

    @property
    def options(self) -> dict[str, Any]:
        """The reward's own options, its defaults filled in."""
        return dict(self.__pydantic_extra__ or {})

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        _reward(value)
        return value

    @model_validator(mode="after")
    def _options_hold(self) -> Self:
        options = _reward(self.name).Options.model_validate(self.options)
        self.__pydantic_extra__ = options.model_dump(mode="json")
        return self

    @classmethod
    def surviving(cls, parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
        """Another reward starts from its own defaults: only the weight stays."""
        if child.get("name", parent.get("name")) == parent.get("name"):
            return dict(parent)
        return {key: value for key, value in parent.items() if key == "weight"}

    @classmethod
    def open_model(cls, field: str | None, raw: Mapping[str, Any]) -> type[BaseModel] | None:
        """The options of the named reward stand beside the fields."""
        try:
            return None if field is not None else _reward(raw.get("name")).Options
        except ValueError:
            return None


def _reward(name: Any) -> Any:
    """The reward class, imported late: rewards depend on torch and on this package. UnknownName if there is none."""
    from megatron_urlvr.rewards.registry import get_reward

    return get_reward(str(name))


class ProviderSection(Section):
    """A provider of signals: its name, and its own options beside it."""

    model_config = ConfigDict(extra="allow")

    name: str
    """`judge` (a model's verdicts), `votes` (somebody else's vote), `checker` (a task's own), `unit_tests`, or one from
    an entry point."""

    @property
    def options(self) -> dict[str, Any]:
        """The provider's own options, its defaults filled in."""
        return dict(self.__pydantic_extra__ or {})

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        _provider(value)
        return value

    @model_validator(mode="after")
    def _options_hold(self) -> Self:
        options = _provider(self.name).Options.model_validate(self.options)
        self.__pydantic_extra__ = options.model_dump(mode="json")
        return self

    @classmethod
    def surviving(cls, parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
        """Another provider starts from its own defaults."""
        return dict(parent) if child.get("name", parent.get("name")) == parent.get("name") else {}

    @classmethod
    def open_model(cls, field: str | None, raw: Mapping[str, Any]) -> type[BaseModel] | None:
        """The options of the named provider stand beside the name."""
        try:
            return None if field is not None else _provider(raw.get("name")).Options
        except ValueError:
            return None


def _provider(name: Any) -> Any:
    """The provider class, imported late. UnknownName if there is none."""
    from megatron_urlvr.rewards import get_provider

    return get_provider(str(name))


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
