"""The config of `urlvr study`: bases and runs that are reported on together."""

import itertools
import math
import re
from collections.abc import Iterable
from typing import TypeVar

from pydantic import Field

from .base import Section, rule

T = TypeVar("T")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class BaseSpec(Section):
    config: str
    """A pretraining config, relative to the study's file."""
    overrides: list[str] = Field(default_factory=list)
    """Settings laid over it, as on the command line."""


class StudyRun(Section):
    config: str
    """A run config, relative to the study's file."""
    base: str | None = None
    """`<base>/<snapshot>`: becomes the run's `model.path`. None: the path that the run config says."""
    overrides: list[str] = Field(default_factory=list)
    """Settings laid over it, as on the command line."""
    label: str | None = None
    """Name in figures; None: the run's key."""
    seeds: list[int] | None = None
    """Seeds of this run; None: the study's."""


class GridPoint(Section):
    """What one value of a grid's axis adds to a run."""

    config: str | None = None
    """Run config, relative to the study's file; the last axis that says one wins."""
    base: str | None = None
    """As in a run; the last axis that says one wins."""
    overrides: list[str] = Field(default_factory=list)
    """Settings laid over the config, after those of earlier axes."""
    label: str | None = None
    """Part of the name in figures; None: the value's key."""
    seeds: list[int] | None = None
    """Seeds of the runs with this value; the last axis that says some wins."""


class StudyConfig(Section):
    name: str = Field(min_length=1)
    """Name of the study in logs."""
    dir: str = Field(min_length=1)
    """Folder of the runs (`runs/<key>`), their logs and the report."""
    title: str
    """Heading of the report and of its first figure."""
    notes: list[str] = Field(default_factory=list)
    """Sentences printed at the head of the report."""
    bases: dict[str, BaseSpec] = Field(default_factory=dict)
    """Base policies to pretrain, by name; each is made once and kept."""
    runs: dict[str, StudyRun] = Field(default_factory=dict)
    """Training runs, by key."""
    grid: list[dict[str, GridPoint]] = Field(default_factory=list)
    """Axes of a grid: a run for every combination of their values, called `<value>.<value>`, besides `runs`."""
    hours: float | None = Field(default=None, gt=0)
    """Start no more runs after so long; the same command continues later. None: no limit."""
    jobs: int = Field(default=1, ge=1)
    """Runs at once, each in processes of its own."""
    seeds: list[int] = Field(default_factory=list)
    """Repeat bases and runs for each seed (pretraining, data and RL); empty: as the configs say."""
    select_set: str | None = None
    """Evaluation set on which each run's peak step is chosen. With `measure_set`."""
    measure_set: str | None = None
    """Disjoint evaluation set on which start, peak and end are measured. With `select_set`."""

    def all_runs(self) -> dict[str, StudyRun]:
        """`runs`, and those of the grid in the order of its axes, the first the slowest. ValueError for a combination
        without a config."""
        out = dict(self.runs)
        for values in itertools.product(*(axis.items() for axis in self.grid)) if self.grid else ():
            key = ".".join(name for name, _ in values)
            points = [point for _, point in values]
            config = _last(point.config for point in points)
            if config is None:
                raise ValueError(f"grid: the combination {key} has no config: give one on any of its axes")
            out[key] = StudyRun(
                config=config,
                base=_last(point.base for point in points),
                overrides=[override for point in points for override in point.overrides],
                label=", ".join(point.label or name for name, point in values),
                seeds=_last(point.seeds for point in points),
            )
        return out

    def labels_within_base(self) -> dict[str, str]:
        """Names of the grid's runs beside others from the same base: without the parts of axes that choose the base.
        Empty where no axis does."""
        rest = [not any(point.base for point in axis.values()) for axis in self.grid]
        if all(rest) or not any(rest):
            return {}
        return {
            ".".join(name for name, _ in values): ", ".join(
                point.label or name for (name, point), kept in zip(values, rest, strict=True) if kept
            )
            for values in itertools.product(*(axis.items() for axis in self.grid))
        }

    @rule("runs", "grid")
    def _something_to_run(self) -> str | None:
        if empty := [number for number, axis in enumerate(self.grid) if not axis]:
            return f"grid: axis {empty[0]} has no values, so that there would be no run at all"
        try:
            runs = self.all_runs()
        except ValueError as error:
            return str(error)
        if not runs:
            return "runs and grid are both empty: there is nothing to run"
        count = len(self.runs) + math.prod(len(axis) for axis in self.grid) * bool(self.grid)
        return None if len(runs) == count else "grid: two runs have the same key; rename a value, or a run"

    @rule("bases", "runs", "grid")
    def _keys_are_folder_names(self) -> str | None:
        if wrong := [key for key in (*self.bases, *self._runs_if_any()) if not _KEY.fullmatch(key)]:
            return (
                f"{', '.join(map(repr, wrong))}: keys of bases and runs name folders, so they hold letters, digits,"
                " '.', '_' and '-', and begin with a letter or digit"
            )
        return None

    @rule("bases", "runs", "grid")
    def _bases_are_there(self) -> str | None:
        for key, run in self._runs_if_any().items():
            if run.base is None:
                continue
            base, slash, snapshot = run.base.partition("/")
            if not slash or not snapshot or base not in self.bases:
                return (
                    f"runs.{key}.base = {run.base!r}: must be <base>/<snapshot> with a base of this study"
                    f" ({', '.join(self.bases) or 'there is none'})"
                )
        return None

    def _runs_if_any(self) -> dict[str, StudyRun]:
        """All runs; none where the grid itself is at fault, which is told once."""
        try:
            return self.all_runs()
        except ValueError:
            return {}

    @rule("seeds", "runs", "grid")
    def _seeds_differ(self) -> str | None:
        places = {"seeds": self.seeds} | {f"runs.{key}.seeds": run.seeds for key, run in self._runs_if_any().items()}
        for place, seeds in places.items():
            if seeds is not None and (len(set(seeds)) < len(seeds) or any(seed < 0 for seed in seeds)):
                return f"{place} = {seeds}: must be different numbers from 0 up"
        return None

    @rule("select_set", "measure_set")
    def _two_sets(self) -> str | None:
        if (self.select_set is None) != (self.measure_set is None):
            return "select_set and measure_set go together: the peak is chosen on one and measured on the other"
        if self.select_set is not None and self.select_set == self.measure_set:
            return (
                f"select_set and measure_set are both {self.select_set!r}: a peak measured where it was chosen is"
                " biased upwards; name two disjoint sets"
            )
        return None


def _last(values: Iterable[T | None]) -> T | None:
    """The last of `values` that is not None."""
    return next((value for value in reversed(list(values)) if value is not None), None)
