"""Rewards by name, and what is to be said about each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic_core import PydanticUndefined

from megatron_urlvr.registry import Registry

from .base import Range, Reward

RewardClass = TypeVar("RewardClass", bound=type[Reward[Any]])

_rewards: Registry[type[Reward[Any]]] = Registry("reward")
RESERVED = frozenset({"name", "weight", "normalize"})
"""Keys of a term that no reward's option may be called."""


def register(cls: RewardClass) -> RewardClass:
    """Class decorator: make `cls` available under `cls.name`."""
    _check(cls, cls.name)
    _rewards.add(cls.name, cls)
    return cls


def get_reward(name: str) -> type[Reward[Any]]:
    """The reward class called `name`. UnknownName if there is none."""
    cls = _rewards.get(name)
    _check(cls, name)
    return cls


def available() -> list[str]:
    """Names of all rewards, those of installed entry points included."""
    return _rewards.names()


def _check(cls: Any, name: str) -> None:
    """TypeError if `cls` does not keep the contract of a reward."""
    if not (isinstance(cls, type) and issubclass(cls, Reward)):
        raise TypeError(f"reward {name!r} is {cls!r}, which is no subclass of megatron_urlvr.rewards.Reward")
    if absent := [a for a in ("name", "needs", "formula", "value_range", "source") if not hasattr(cls, a)]:
        raise TypeError(f"reward {name!r} ({cls.__qualname__}) lacks the class attributes {', '.join(absent)}")
    if not isinstance(cls.value_range, Range):
        raise TypeError(
            f"reward {name!r} has value_range = {cls.value_range!r}, which must be a megatron_urlvr.rewards.Range: "
            "write Range(low, high)"
        )
    if {"label", "permuted_label"} & cls.needs and not cls.supervised:
        raise TypeError(f"reward {name!r} needs labels and must say so with supervised = True")
    if taken := RESERVED & set(cls.Options.model_fields):
        raise TypeError(f"reward {name!r} has options called {sorted(taken)}, which are keys of every term")


@dataclass(frozen=True)
class OptionInfo:
    """One option of a reward."""

    name: str
    type: str
    default: str | None
    """None when the option must be given."""
    doc: str


@dataclass(frozen=True)
class RewardInfo:
    """What `urlvr rewards` prints about a reward."""

    name: str
    formula: str
    needs: tuple[str, ...]
    value_range: str
    supervised: bool
    source: str
    options: tuple[OptionInfo, ...]


def describe() -> list[RewardInfo]:
    """All rewards, sorted by name."""
    return [_info(get_reward(name)) for name in available()]


def _info(cls: type[Reward[Any]]) -> RewardInfo:
    options = tuple(
        OptionInfo(
            name=name,
            type=str(field.annotation).replace("typing.", "")
            if not isinstance(field.annotation, type)
            else field.annotation.__name__,
            default=None if field.default is PydanticUndefined else repr(field.default),
            doc=field.description or "",
        )
        for name, field in cls.Options.model_fields.items()
    )
    return RewardInfo(
        name=cls.name,
        formula=cls.formula,
        needs=tuple(sorted(cls.needs)),
        value_range=str(cls.value_range),
        supervised=cls.supervised,
        source=cls.source,
        options=options,
    )
