"""Sections that name a registered thing and hold its options beside the name: reward terms, providers, filters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from .base import Section


class NamedSection(Section):
    """A name, and the options of what it names beside it, checked by that thing's own model and with its defaults."""

    model_config = ConfigDict(extra="allow")

    name: str
    keeps: ClassVar[frozenset[str]] = frozenset()
    """Fields that stay when a layer changes the name; the rest starts from the new thing's defaults."""

    @classmethod
    @abstractmethod
    def named(cls, name: str) -> Any:
        """What is registered under `name`: a class with a pydantic model `Options`. UnknownName if there is none.
        Imported late: what is registered depends on torch and on this package."""

    @property
    def options(self) -> dict[str, Any]:
        """The options of what is named, its defaults filled in."""
        return dict(self.__pydantic_extra__ or {})

    @field_validator("name", check_fields=False)
    @classmethod
    def _known(cls, value: str) -> str:
        cls.named(value)
        return value

    @model_validator(mode="after")
    def _options_hold(self) -> Self:
        self.__pydantic_extra__ = self.named(self.name).Options.model_validate(self.options).model_dump(mode="json")
        return self

    @classmethod
    def surviving(cls, parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
        """See `keeps`; of the same thing's options, what its own model lets survive."""
        if child.get("name", parent.get("name")) == parent.get("name"):
            options = cls.open_model(None, parent)
            return options.surviving(parent, child) if options and issubclass(options, Section) else dict(parent)
        return {key: value for key, value in parent.items() if key in cls.keeps}

    @classmethod
    def open_model(cls, field: str | None, raw: Mapping[str, Any]) -> type[BaseModel] | None:
        """The options of what is named stand beside the fields."""
        try:
            return None if field is not None else cls.named(str(raw.get("name"))).Options
        except ValueError:
            return None
