"""What the config models say about a place in the YAML tree: which model reads it, and what a setting may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, Discriminator, Tag
from pydantic.fields import FieldInfo

from .base import Section


def split_annotated(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """An annotation without `Annotated`, and the metadata that stood in it."""
    if get_origin(annotation) is Annotated:
        core, *metadata = get_args(annotation)
        return core, tuple(metadata)
    return annotation, ()


def tagged_models(annotation: Any) -> dict[str, type[BaseModel]]:
    """The models of a discriminated union by their tag; empty for anything else."""
    core, metadata = split_annotated(annotation)
    if not _is_union(core) or _discriminator(metadata) is None:
        return {}
    out: dict[str, type[BaseModel]] = {}
    for member in get_args(core):
        model, tags = split_annotated(member)
        out.update({tag.tag: model for tag in tags if isinstance(tag, Tag)})
    return out


def model_at(annotation: Any, raw: Any) -> type[BaseModel] | None:
    """The model that `raw` is read with; None where the annotation holds none."""
    core, metadata = split_annotated(annotation)
    if isinstance(core, type) and issubclass(core, BaseModel):
        return core
    if tagged := tagged_models(annotation):
        choose = _discriminator(metadata)
        assert choose is not None
        assert callable(choose.discriminator)
        return tagged[str(choose.discriminator(raw))]
    return None


def entry_annotation(annotation: Any) -> Any | None:
    """The annotation of one entry, where `annotation` is a mapping from names to sections; else None."""
    core, _ = split_annotated(annotation)
    if get_origin(core) is dict and model_at(get_args(core)[1], {}) is not None:
        return get_args(core)[1]
    return None


def fields_at(annotation: Any, raw: Any) -> dict[str, FieldInfo] | None:
    """The settings that may stand at this place (a reward's own options included); None where the keys are free."""
    model = model_at(annotation, raw)
    if model is None:
        return None
    beside = open_model(model, None, raw)
    return {**model.model_fields, **(beside.model_fields if beside else {})}


def open_model(model: type[BaseModel], field: str | None, raw: Any) -> type[BaseModel] | None:
    """`Section.open_model`, for any model and any raw value."""
    if issubclass(model, Section) and isinstance(raw, Mapping):
        return model.open_model(field, raw)
    return None


def descend(annotation: Any, raw: Any, key: str) -> tuple[Any, Any]:
    """(annotation, raw value) below `key`; the annotation is Any where the models say nothing."""
    below = raw.get(key) if isinstance(raw, Mapping) else None
    if (entry := entry_annotation(annotation)) is not None:
        return entry, below
    field = (fields_at(annotation, raw) or {}).get(key)
    if field is None:
        return Any, below
    model = model_at(annotation, raw)
    inside = open_model(model, key, raw) if model is not None else None
    return inside or field.rebuild_annotation(), below


def describe(annotation: Any) -> str:
    """What a setting may be, to stand after "must be": `an integer, at least 1`."""
    core, metadata = split_annotated(annotation)
    origin = get_origin(core)
    if (entry := entry_annotation(annotation)) is not None:
        return f"a mapping from names to sections ({_settings_of(entry)})"
    if model_at(annotation, {}) is not None:
        return f"a section ({_settings_of(annotation)})"
    if _is_union(core):
        members = [Annotated[member, *metadata] if metadata else member for member in get_args(core)]
        inner = dict.fromkeys(describe(member) for member in members if split_annotated(member)[0] is not NoneType)
        return " or ".join([*inner, *(["null"] if NoneType in get_args(core) else [])])
    if origin is Literal:
        choices = [repr(choice) for choice in get_args(core)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin in (list, tuple, set, frozenset):
        return f"a list, each item {describe(get_args(core)[0])}"
    if origin is dict or core is dict:
        return "a mapping"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return ", ".join([names.get(core, "any value"), *_limits(metadata, core)])


def choices(annotation: Any) -> list[str]:
    """The texts that a setting is chosen from, where it is chosen from some."""
    core, _ = split_annotated(annotation)
    if get_origin(core) is Literal:
        return [choice for choice in get_args(core) if isinstance(choice, str)]
    return [choice for member in get_args(core) for choice in choices(member)] if _is_union(core) else []


def _is_union(core: Any) -> bool:
    return get_origin(core) in (Union, UnionType)


def _discriminator(metadata: tuple[Any, ...]) -> Discriminator | None:
    return next((item for item in metadata if isinstance(item, Discriminator)), None)


def _limits(metadata: tuple[Any, ...], core: Any) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _limits(tuple(item.metadata), core)
        elif core in (int, float):
            for kind, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
                if (limit := getattr(item, kind, None)) is not None:
                    yield f"{words} {limit}"
        elif core is str and isinstance(item, annotated_types.MinLen):
            yield "not empty"
        elif core is str and (pattern := getattr(item, "pattern", None)):
            yield f"matching {pattern}"


def _settings_of(annotation: Any) -> str:
    only = model_at(annotation, {})
    models = list(tagged_models(annotation).values()) or ([only] if only else [])
    return "; or ".join(", ".join(model.model_fields) for model in models)
