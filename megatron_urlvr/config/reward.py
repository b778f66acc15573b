"""`reward`: the terms whose weighted sum is the proxy reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .base import Section


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


class RewardSection(Section):
    terms: dict[str, TermSection] = Field(min_length=1)
    """Terms by label."""
    temperature: Literal["rollout"] | Annotated[float, Field(gt=0)] = "rollout"
    """Temperature of the token statistics; `rollout` is the sampling temperature, as in the released URLVR code."""
    statistics: Literal["trainer", "servers"] = "trainer"
    """Who computes the token statistics that rewards are made of. `servers`: the SGLang plug-in while it samples, so
    that the trainer's scoring pass is skipped; they are then those of the weights and the engine that sampled."""
