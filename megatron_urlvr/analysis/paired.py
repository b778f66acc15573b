"""Two policies on one set of problems, compared problem by problem: tables of `urlvr eval`, read and paired."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_urlvr.exit_codes import UnusableInput

from .peaks import bootstrap_mean_interval

MEASURES = ("avg", "maj", "greedy")
"""Columns of a problem table that can be compared."""


@dataclass(frozen=True)
class Comparison:
    """`other - one` over the problems, with the 95 % percentile interval of resampling problems in pairs."""

    measure: str
    problems: int
    one: float
    other: float
    difference: float
    low: float
    high: float
    better: int
    """Problems on which `other` has more."""
    worse: int


def read_table(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of a problem table by problem. UnusableInput for what is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UnusableInput(f"there is no file {path}: `urlvr eval` writes such tables to RUN/evals/.") from None
    except OSError as error:
        raise UnusableInput(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UnusableInput(f"{path} is no text: {error}.") from error
    table = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = _row(line)
            if row is None:
                raise UnusableInput(f"{path}, line {number} is no problem as `urlvr eval` writes it: {line[:80]}")
            table[str(row["id"])] = row
    if not table:
        raise UnusableInput(f"{path} holds no problems.")
    return table


def _row(line: str) -> dict[str, Any] | None:
    """An object with an id and at least one measure, measures being finite numbers or null; None for another."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or "id" not in row or not any(name in row for name in MEASURES):
        return None
    numbers = all(
        row.get(name) is None or (isinstance(row[name], int | float) and math.isfinite(row[name])) for name in MEASURES
    )
    return row if numbers else None


def compare(one: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> list[Comparison]:
    """All measures that both tables have of every problem. UnusableInput where there is none, or where they are not of
    the same problems."""
    if one.keys() != other.keys():
        differing = sorted(one.keys() ^ other.keys())
        raise UnusableInput(
            f"the tables are not of the same problems: {len(differing)} are in one of them only, such as"
            f" {differing[0]}. Evaluate both policies on the same set."
        )
    out = []
    for measure in MEASURES:
        pairs = [(one[key].get(measure), other[key].get(measure)) for key in one]
        if any(a is None or b is None for a, b in pairs):
            continue
        first, second = np.array(pairs, dtype=np.float64).T
        gaps = second - first
        low, high = bootstrap_mean_interval(gaps, seed=0)
        better, worse = int((gaps > 0).sum()), int((gaps < 0).sum())
        means = float(first.mean()), float(second.mean()), float(gaps.mean())
        out.append(Comparison(measure, len(pairs), *means, low, high, better, worse))
    if not out:
        raise UnusableInput(
            f"the tables have no measure in common: both must say one of {', '.join(MEASURES)} of every problem."
        )
    return out
