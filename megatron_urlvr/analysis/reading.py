"""The files of a run folder, read back: settings, JSON objects, metrics. What cannot be used is a RunError."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_urlvr.exit_codes import UnusableInput


class RunError(UnusableInput):
    """A folder cannot be read as a run."""


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a run's config.yaml. RunError where there is none."""
    try:
        tree = yaml.safe_load(_text(path))
    except FileNotFoundError as error:
        raise RunError(f"{path.parent} is no run folder: it has no {path.name}") from error
    except yaml.YAMLError as error:
        raise RunError(f"{path} is no readable YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RunError(f"{path} holds no settings")
    return tree


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when it is not there."""
    try:
        text = _text(path)
    except FileNotFoundError:
        return {}
    try:
        return _object(text)
    except ValueError as error:
        raise RunError(f"{path} is no readable JSON: {error}") from error


def read_objects(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; empty when it is not there. A last line that a process is still writing is left."""
    try:
        *whole, unfinished = _text(path).split("\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(whole, start=1):
        if not line.strip():
            continue
        try:
            rows.append(_object(line))
        except ValueError as error:
            raise RunError(f"{path}, line {number} is no JSON object: {error}") from error
    with contextlib.suppress(ValueError):
        rows.append(_object(unfinished))
    return rows


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; what is not finite is None, as runs write it. RunError for a row without a step, or with
    a value that is neither number nor null."""
    rows = read_objects(path)
    for row in rows:
        if type(row.get("step")) is not int:
            raise RunError(f"{path} has a row whose step is {row.get('step')!r}: it must be an integer")
        for name, value in row.items():
            if value is not None and type(value) not in (int, float):
                raise RunError(f"{path}, step {row['step']}: {name} = {value!r} is no number")
            if value is not None and not abs(value) <= sys.float_info.max:  # NaN too
                row[name] = None
    return rows


def _object(text: str) -> dict[str, Any]:
    """ValueError says what is wrong."""
    tree = json.loads(text)
    if not isinstance(tree, dict):
        raise ValueError(f"it is a {type(tree).__name__}")
    return tree


def _text(path: Path) -> str:
    """FileNotFoundError where there is no such file, RunError for one that cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is no text: {error}") from error
