"""From YAML files and command-line overrides to a validated config.

    base.yaml <- child.yaml (`extends: base.yaml`) <- overrides (`key.path=value`)

Each layer is laid over the one before: mappings merge, everything else replaces. What of a section survives the layer
above it is the section's own affair (`Section.surviving`): a reward term whose name changes starts afresh, and so do
a task's settings when the task changes. `null` deletes an entry of a mapping of sections (`reward.terms.aux=null`).
There is no interpolation, so a file says what it says wherever it is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .base import Section
from .errors import ConfigError, did_you_mean, show, validate
from .mcs import McsConfig
from .pretrain import PretrainConfig
from .root import Config
from .schema import descend, entry_annotation, model_at
from .study import StudyConfig

ModelT = TypeVar("ModelT", bound=Section)
Tree = dict[str, Any]

_KEY = re.compile(r"(?!-)[^=.\s]+(\.[^=.\s]+)*")


@overload
def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config: ...
@overload
def load_config(path: str | Path, overrides: Sequence[str], model: type[ModelT]) -> ModelT: ...


def load_config(path: str | Path, overrides: Sequence[str] = (), model: type[Any] = Config) -> Any:
    """The validated config of `path` (a YAML file, or the folder of a run, which holds its `config.yaml`) with
    `overrides` (`key.path=value`, values in YAML) laid over it as one layer. Of a folder, `run.dir` is that folder.

    Raises ConfigError, which lists every violation at once.
    """
    given, path = Path(path), config_file(path)
    layers = Layers(model)
    layers.add_file(path)
    if given.is_dir():
        layers.found_in(given)
    layers.add_overrides(overrides)
    config, violations = validate(model, layers.tree, layers.hints)
    if layers.violations or config is None:
        raise ConfigError([*layers.violations, *violations], str(path))
    return config


def config_file(path: str | Path) -> Path:
    """`path` itself, or the `config.yaml` in it when it is the folder of a run. ConfigError for another folder."""
    path = Path(path)
    if not path.is_dir():
        return path
    file = path / "config.yaml"
    if not file.is_file():
        raise ConfigError([f"{path} is a folder, and no run's: it has no {file.name}. Give a YAML file."], str(path))
    return file


def model_of(path: str | Path) -> type[Section]:
    """Which kind of config a file is: a study has `runs` or a `grid`, `urlvr mcs` has `policies`, pretraining has
    `snapshots`; else it is a training run."""
    layers = Layers(Config)
    layers.add_file(config_file(path))
    if {"runs", "grid"} & set(layers.tree):
        return StudyConfig
    if "policies" in layers.tree:
        return McsConfig
    return PretrainConfig if "snapshots" in layers.tree else Config


def to_yaml(config: Section) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


class Layers:
    """The layers read so far, merged into `tree`; what was wrong with them as such is in `violations`."""

    def __init__(self, model: type[Section]) -> None:
        self.model = model
        self.tree: Tree = {}
        self.violations: list[str] = []
        self.hints: dict[tuple[str, ...], str] = {}

    def add_file(self, path: Path, chain: tuple[Path, ...] = ()) -> None:
        """Lay `path` over the tree, after the files that it extends. Raises ConfigError on what cannot be read."""
        resolved = path.resolve()
        if resolved in chain:
            circle = " -> ".join(str(item) for item in (*chain[chain.index(resolved) :], resolved))
            raise ConfigError([f"extends goes in a circle: {circle}. Remove one of these lines."], str(path))
        layer = read_yaml(path)
        parents = layer.pop("extends", [])
        parents = [parents] if isinstance(parents, str) else parents
        if not isinstance(parents, list) or not all(isinstance(item, str) for item in parents):
            raise ConfigError([f"extends = {show(parents)}: must be a file or a list of files."], str(path))
        for parent in parents:
            self.add_file(path.parent / parent, (*chain, resolved))
        self._lay(layer)

    def found_in(self, folder: Path) -> None:
        """Let `run.dir` be the `folder` of the run where it says another: the folder was moved or copied, or the path
        was relative to another working directory."""
        run = self.tree.get("run")
        written = run.get("dir") if isinstance(run, dict) else None
        if isinstance(written, str) and Path(written).resolve() != folder.resolve():
            self._lay({"run": {"dir": str(folder)}})

    def add_overrides(self, overrides: Sequence[str]) -> None:
        """Lay all overrides over the tree as one layer, so that their order matters only for one and the same key."""
        layer: Tree = {}
        for override in overrides:
            try:
                key, value = parse_override(override)
                self._refuse_descent(key, override)
                _assign(layer, key, value)
            except ValueError as error:
                self.violations.append(str(error))
        self._lay(layer)

    def _lay(self, layer: Tree) -> None:
        self.tree = self._merge(self.model, self.tree, layer, ())

    def _merge(self, annotation: Any, parent: Tree, child: Tree, path: tuple[str, ...]) -> Tree:
        model = model_at(annotation, {**parent, **child})
        if model is not None and issubclass(model, Section) and parent:
            parent = model.surviving(parent, child)
        is_mapping = entry_annotation(annotation) is not None
        merged = dict(parent)
        for key, value in child.items():
            place = (*path, key)
            below, _ = descend(annotation, {**parent, **child}, key)
            if value is None and is_mapping:
                if key not in merged:
                    hint = did_you_mean(key, merged, "".join(f"{part}." for part in path))
                    self.violations.append(f"{'.'.join(place)} = null: there is no such entry to delete.{hint}")
                merged.pop(key, None)
                continue
            if is_mapping and key not in merged and (hint := did_you_mean(key, merged, "".join(f"{p}." for p in path))):
                self.hints[place] = hint
            if isinstance(value, dict):
                under = merged.get(key)
                value = self._merge(below, under if isinstance(under, dict) else {}, value, place)
            merged[key] = value
        return merged

    def _refuse_descent(self, key: Sequence[str], override: str) -> None:
        """An override goes into sections; a list or a number in its way is replaced whole, never entered."""
        node: Any = self.tree
        for depth, part in enumerate(key[:-1]):
            node = node.get(part)
            if node is None:
                return
            if not isinstance(node, dict):
                above = ".".join(key[: depth + 1])
                raise ValueError(f"{override}: {above} is {show(node)}, not a section. Set it whole: {above}=value.")


def read_yaml(path: Path) -> Tree:
    """The mapping in a YAML file, or ConfigError with what is wrong and where."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        names = [item.name for item in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, names, "" if path.parent == Path() else f"{path.parent}/")
        raise ConfigError([f"there is no file {path}.{hint}"], str(path)) from None
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}."], str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path} is no text: {error}."], str(path)) from None
    try:
        tree = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError([f"not valid YAML{where}: {error.problem}."], str(path)) from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError([_unparsable(text, error)], str(path)) from None
    if not isinstance(tree, dict):
        raise ConfigError([f"holds {show(tree)}, but a config is a mapping of sections."], str(path))
    if wrong := [*_unreadable(tree, ())]:
        raise ConfigError(wrong, str(path))
    return tree  # type: ignore[return-value]


def parse_override(override: str) -> tuple[list[str], Any]:
    """(`["reward", "terms", "main", "weight"]`, 0.5) of `reward.terms.main.weight=0.5`. ValueError is a sentence."""
    key, equals, text = override.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise ValueError(f"{override!r} is no override: write key.path=value, such as run.steps=50.")
    if not text.strip():
        raise ValueError(f"{override!r} has no value: write {key}=null for null, {key}='\"\"' for empty text.")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"{override!r}: the value is not valid YAML: {problem}.") from None
    except OmegaConfBaseException as error:
        raise ValueError(f"{override!r}: {_unparsable(text, error)}") from None
    if wrong := [*_unreadable(value, tuple(key.split(".")))]:
        raise ValueError(" ".join(wrong))
    return key.split("."), value


def _assign(layer: Tree, key: Sequence[str], value: Any) -> None:
    for part in key[:-1]:
        below = layer.get(part)
        if not isinstance(below, dict):
            below = layer[part] = {}
        layer = below
    layer[key[-1]] = value


def _unparsable(text: str, error: Exception) -> str:
    return _NO_INTERPOLATION if "${" in text else f"cannot be read as YAML: {error}."


_NO_INTERPOLATION = "interpolation (${...}) is not supported: write the value itself, or pass it as an override."


def _unreadable(node: Any, path: tuple[str, ...]) -> list[str]:
    """Sentences on keys that are no text and on values that ask for interpolation."""
    key = ".".join(path)
    if isinstance(node, str) and "${" in node:
        return [f"{key} = {show(node)}: {_NO_INTERPOLATION}"]
    if isinstance(node, dict):
        odd = [name for name in node if not isinstance(name, str)]
        wrong = [f"{key or 'the top'} has the key {show(name)}, which is no text: quote it." for name in odd]
        return wrong + [item for name, value in node.items() for item in _unreadable(value, (*path, str(name)))]
    if isinstance(node, list):
        return [item for index, value in enumerate(node) for item in _unreadable(value, (*path, str(index)))]
    return []
