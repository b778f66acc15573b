"""ConfigError, and the translation of pydantic's findings into sentences, every violation at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from megatron_urlvr.exit_codes import UnusableInput

from .base import RuleError, Section, UnknownName
from .schema import choices, descend, describe, entry_annotation, fields_at, model_at, open_model, tagged_models

Path = tuple[str, ...]
ModelT = TypeVar("ModelT", bound=Section)


class ConfigError(UnusableInput):
    """A config cannot be used. `violations` holds one sentence for each thing that is wrong."""

    def __init__(self, violations: Sequence[str], source: str = "") -> None:
        self.violations = tuple(violations)
        self.source = source
        count = "one violation" if len(violations) == 1 else f"{len(violations)} violations"
        super().__init__("\n".join([f"{source or 'The config'}: {count}.", *(f"  - {item}" for item in violations)]))


class Finding(NamedTuple):
    path: Path
    kind: str
    """`missing` or `unknown` key, `invalid` value, or broken `rule`."""
    sentence: str


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """` Did you mean x?` for the nearest of `known`, or an empty string when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {prefix}{near[0]}?" if near else ""


def show(value: Any) -> str:
    """A value as a sentence shows it: YAML's words, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:76] + " ..."


def validate(
    model: type[ModelT], tree: Mapping[str, Any], hints: Mapping[Path, str] | None = None
) -> tuple[ModelT | None, list[str]]:
    """(the config, []), or (None, one sentence for each violation in `tree`, section by section).

    `hints` say what may have been meant by a section, by its path; they follow the sentence on what it is missing."""
    try:
        return model.model_validate(tree), []
    except ValidationError as error:
        findings = _findings(model, tree, error)
    # With an unknown key a section is not built, and its rules are not checked: once more without those keys.
    if unknown := [finding.path for finding in findings if finding.kind == "unknown"]:
        tree = _without(tree, unknown)
        try:
            model.model_validate(tree)
        except ValidationError as error:
            findings += _findings(model, tree, error)
    # Likewise with an invalid value: what does not touch it is still checked.
    invalid = frozenset(".".join(finding.path) for finding in findings if finding.kind in ("invalid", "missing"))
    rules = frozenset(".".join(finding.path) for finding in findings if finding.kind == "rule")
    findings += _beside(model, tree, (), invalid, invalid | rules)
    order = {name: place for place, name in enumerate(model.model_fields)}
    findings.sort(key=lambda finding: order.get(finding.path[0], len(order)) if finding.path else len(order) + 1)
    return None, list(dict.fromkeys(_with_hint(finding, hints or {}) for finding in findings))


def _with_hint(finding: Finding, hints: Mapping[Path, str]) -> str:
    return finding.sentence + (hints.get(finding.path[:-1], "") if finding.kind == "missing" else "")


def _findings(model: type[BaseModel], tree: Any, error: ValidationError, prefix: Path = ()) -> list[Finding]:
    return [
        finding
        for item in error.errors(include_url=False)
        for finding in _translate(item, *_locate(model, tree, item["loc"]), prefix)
    ]


class _Place(NamedTuple):
    annotation: Any
    raw: Any


def _locate(model: type[BaseModel], tree: Any, loc: Sequence[int | str]) -> tuple[Path, _Place, _Place]:
    """(path, the place, the place above it) of pydantic's location: the tags of unions are no keys, and what is
    inside a list or a scalar belongs to the setting."""
    path: list[str] = []
    above = here = _Place(model, tree)
    for part in loc:
        if part in (tagged := tagged_models(here.annotation)):
            here = _Place(tagged[str(part)], here.raw)
            continue
        if fields_at(*here) is None and entry_annotation(here.annotation) is None:
            break
        above, here = here, _Place(*descend(*here, str(part)))
        path.append(str(part))
    return tuple(path), here, above


def _translate(item: Any, path: Path, here: _Place, above: _Place, prefix: Path) -> Iterator[Finding]:
    path = (*prefix, *path)
    key, value, kind = ".".join(path), show(here.raw), item["type"]
    cause = (item.get("ctx") or {}).get("error")
    if kind == "missing":
        yield Finding(path, "missing", f"{key} is missing: it must be {describe(here.annotation)}.")
    elif kind == "extra_forbidden":
        known = list(fields_at(*above) or {})
        parent = ".".join(path[:-1])
        hint = did_you_mean(path[-1], known, f"{parent}." if parent else "")
        where = f"in {parent}" if parent else "at the top"
        yield Finding(path, "unknown", f"{key} = {value}: no such setting.{hint} Known {where}: {', '.join(known)}.")
    elif isinstance(cause, RuleError):
        for sentence in cause.sentences:
            yield _broken_rule(path, sentence)
    elif isinstance(cause, UnknownName):
        hint = did_you_mean(cause.name, cause.known)
        sentence = f"{key} = {value}: there is no such {cause.kind}.{hint} Known: {', '.join(cause.known)}."
        yield Finding(path, "invalid", sentence)
    elif cause is not None:
        yield Finding(path, "invalid", f"{key} = {value}: {str(cause).rstrip('.')}.")
    elif kind == "too_short" and not isinstance(here.raw, str):
        sentence = f"{key} is empty: it must be {describe(here.annotation)}, with at least one entry."
        yield Finding(path, "invalid", sentence)
    else:
        hint = did_you_mean(here.raw, choices(here.annotation)) if isinstance(here.raw, str) else ""
        yield Finding(path, "invalid", f"{key} = {value}: must be {describe(here.annotation)}.{hint}")


def _broken_rule(path: Path, sentence: str) -> Finding:
    sentence = sentence.rstrip(".") + "."
    return Finding(path, "rule", f"{'.'.join(path)}: {sentence}" if path else sentence)


def _without(tree: Mapping[str, Any], paths: Sequence[Path]) -> dict[str, Any]:
    """`tree` with the keys at `paths` left out."""
    gone = {path[0] for path in paths if len(path) == 1}
    out = {}
    for key, value in tree.items():
        below = [path[1:] for path in paths if len(path) > 1 and path[0] == key]
        if key not in gone:
            out[key] = _without(value, below) if below and isinstance(value, Mapping) else value
    return out


def _beside(
    annotation: Any, raw: Any, path: Path, invalid: frozenset[str], touched: frozenset[str]
) -> Iterator[Finding]:
    """What pydantic passed over, because it does not look further at a section that holds one of the `touched` places
    (dotted): its rules that do not read an `invalid` setting, and its open options."""
    if not isinstance(raw, Mapping) or not _relative(touched, path):
        return
    for key in raw:
        yield from _beside(*descend(annotation, raw, str(key)), (*path, str(key)), invalid, touched)
    model = model_at(annotation, raw)
    if model is None or not issubclass(model, Section):
        return
    below = _relative(invalid, path)
    for sentence in _partial(model, raw, below).broken_rules(below):
        yield _broken_rule(path, sentence)
    if (options := open_model(model, None, raw)) is not None:
        written = {key: value for key, value in raw.items() if key not in model.model_fields}
        try:
            options.model_validate(written)
        except ValidationError as error:
            yield from _findings(options, written, error, path)


def _relative(places: frozenset[str], path: Path) -> frozenset[str]:
    """Those of the dotted `places` that lie inside `path`, relative to it."""
    prefix = "".join(f"{part}." for part in path)
    return frozenset(place[len(prefix) :] for place in places if place.startswith(prefix))


def _partial(model: type[Section], raw: Mapping[str, Any], invalid: frozenset[str]) -> Section:
    """The section with its valid settings alone: a rule that reads none of the others can be asked."""
    values = {
        name: _partial_value(field.rebuild_annotation(), raw[name], _relative(invalid, (name,)))
        for name, field in model.model_fields.items()
        if name in raw and name not in invalid
    }
    return model.model_construct(**values)


def _partial_value(annotation: Any, raw: Any, invalid: frozenset[str]) -> Any:
    try:
        return TypeAdapter(annotation).validate_python(raw)
    except ValidationError:
        model = model_at(annotation, raw)
        if model is not None and issubclass(model, Section) and isinstance(raw, Mapping):
            return _partial(model, raw, invalid)
        if (entry := entry_annotation(annotation)) is not None and isinstance(raw, Mapping):
            return {key: _partial_value(entry, value, _relative(invalid, (key,))) for key, value in raw.items()}
        return None
