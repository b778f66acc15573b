"""The config of `urlvr study`: bases and runs that are reported on together."""

import re

from pydantic import Field

from .base import Section, rule

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
    runs: dict[str, StudyRun] = Field(min_length=1)
    """Training runs, by key."""
    jobs: int = Field(default=1, ge=1)
    """Runs at once, each in processes of its own."""
    seeds: list[int] = Field(default_factory=list)
    """Repeat bases and runs for each seed (pretraining, data and RL); empty: as the configs say."""
    select_set: str | None = None
    """Evaluation set on which each run's peak step is chosen. With `measure_set`."""
    measure_set: str | None = None
    """Disjoint evaluation set on which start, peak and end are measured. With `select_set`."""

    @rule("bases", "runs")
    def _keys_are_folder_names(self) -> str | None:
        if wrong := [key for key in (*self.bases, *self.runs) if not _KEY.fullmatch(key)]:
            return (
                f"{', '.join(map(repr, wrong))}: keys of bases and runs name folders, so they hold letters, digits,"
                " '.', '_' and '-', and begin with a letter or digit"
            )
        return None

    @rule("bases", "runs")
    def _bases_are_there(self) -> str | None:
        for key, run in self.runs.items():
            if run.base is None:
                continue
            base, slash, snapshot = run.base.partition("/")
            if not slash or not snapshot or base not in self.bases:
                return (
                    f"runs.{key}.base = {run.base!r}: must be <base>/<snapshot> with a base of this study"
                    f" ({', '.join(self.bases) or 'there is none'})"
                )
        return None

    @rule("seeds")
    def _seeds_differ(self) -> str | None:
        if len(set(self.seeds)) < len(self.seeds) or any(seed < 0 for seed in self.seeds):
            return f"seeds = {self.seeds}: must be different numbers from 0 up"
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
