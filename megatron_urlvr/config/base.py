"""The base class of every config section: unknown keys are errors, values are checked on assignment too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

Check = TypeVar("Check", bound=Callable[[Any], "str | None"])


def rule(*settings: str) -> Callable[[Check], Check]:
    """Mark a method that returns a sentence when `settings` contradict each other, and None when they agree.

    `settings` are all that the method reads, as dotted paths inside the section: when one of them is itself
    invalid the rule is passed over, so that every other broken rule can still be listed with it.
    """

    def mark(method: Check) -> Check:
        method.__rule_settings__ = settings  # type: ignore[attr-defined]
        return method

    return mark


class RuleError(ValueError):
    """One or more rules of a section are broken; `sentences` says which."""

    def __init__(self, sentences: list[str]) -> None:
        super().__init__("; ".join(sentences))
        self.sentences = sentences


class UnknownName(ValueError):  # noqa: N818 - says what it is about, as KeyError does
    """A name that is in no registry. `kind` is what was looked for, `known` the names there are."""

    def __init__(self, kind: str, name: str, known: list[str]) -> None:
        super().__init__(f"there is no {kind} {name!r}; known: {', '.join(sorted(known))}")
        self.kind, self.name, self.known = kind, name, sorted(known)


class Section(BaseModel):
    """A config section. Attribute docstrings are its documentation (`urlvr config show --docs`)."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_coercion(cls, value: Any, info: ValidationInfo) -> Any:
        """`true` is not the number 1, `"5"` is not 5, `1` is not true: YAML has a way to write each."""
        kinds = set(_scalar_kinds(cls.model_fields[info.field_name or ""].annotation))
        if kinds and (
            (isinstance(value, bool) and bool not in kinds)
            or (isinstance(value, int | float) and not isinstance(value, bool) and not kinds & {int, float})
            or (isinstance(value, str) and str not in kinds)
        ):
            raise PydanticCustomError("wrong_type", "wrong type")
        return value

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        if broken := self.broken_rules():
            raise RuleError(broken)
        return self

    def broken_rules(self, invalid: frozenset[str] = frozenset()) -> list[str]:
        """Sentences of the rules that do not hold. Rules that read a setting in `invalid` (dotted paths inside the
        section), or one above or below it, are passed over."""
        sentences = []
        for method in rules_of(type(self)):
            if any(_related(setting, bad) for setting in method.__rule_settings__ for bad in invalid):
                continue
            if sentence := method(self):
                sentences.append(sentence)
        return sentences

    @classmethod
    def surviving(cls, parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
        """What stays of `parent` when `child` is laid over it, both as written in YAML: everything, by default."""
        return dict(parent)

    @classmethod
    def open_model(cls, field: str | None, raw: Mapping[str, Any]) -> type[BaseModel] | None:
        """The model of what the open mapping `field` may hold (None: of the keys that stand beside the fields), given
        the section as written; None where anything is allowed or it cannot be told."""
        return None


def unread(section: Section, *settings: str) -> list[str]:
    """`name = value` of each of `settings` that is not what it is by default: somebody gave it, though nothing reads
    it. A default that was written out is nobody's wish, and every resolved config holds them all."""
    return [
        f"{name} = {getattr(section, name)!r}"
        for name in settings
        if getattr(section, name) != type(section).model_fields[name].default
    ]


def rules_of(section: type[Section]) -> Iterator[Any]:
    """The methods of `section` that are marked as rules, in order of definition, the base class' first."""
    seen: dict[str, Any] = {}
    for owner in reversed(section.__mro__):
        for name, member in vars(owner).items():
            if hasattr(member, "__rule_settings__"):
                seen[name] = member
    yield from seen.values()


def _related(setting: str, bad: str) -> bool:
    return setting == bad or setting.startswith(bad + ".") or bad.startswith(setting + ".")


def _scalar_kinds(annotation: Any) -> Iterator[type]:
    """The scalar types that `annotation` accepts; nothing when it accepts anything or a container alone."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _scalar_kinds(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _scalar_kinds(member)
    elif origin is Literal:
        yield from (type(choice) for choice in get_args(annotation))
    elif annotation in (bool, int, float, str):
        yield annotation
