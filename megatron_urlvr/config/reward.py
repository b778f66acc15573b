"""`reward`: the terms whose weighted sum is the proxy reward."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

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
        """The reward's own options, as written."""
        return dict(self.__pydantic_extra__ or {})


class RewardSection(Section):
    terms: dict[str, TermSection] = Field(min_length=1)
    """Terms by label."""
    temperature: Literal["rollout"] | float = "rollout"
    """Temperature of the token statistics; `rollout` is the sampling temperature, as in the released URLVR code."""
