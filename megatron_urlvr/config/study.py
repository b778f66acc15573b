"""The config of `urlvr study`: bases and runs that are reported on together."""

from pydantic import Field

from .base import Section


class BaseSpec(Section):
    config: str
    """A pretraining config, relative to the study's file."""
    overrides: list[str] = Field(default_factory=list)


class StudyRun(Section):
    config: str
    """A run config, relative to the study's file."""
    base: str | None = None
    """`<base>/<snapshot>`: becomes the run's `model.path`."""
    overrides: list[str] = Field(default_factory=list)
    label: str | None = None
    """Name in figures; None: the run's key."""


class StudyConfig(Section):
    name: str = Field(min_length=1)
    dir: str = Field(min_length=1)
    """Folder of the runs and the report."""
    title: str
    notes: list[str] = Field(default_factory=list)
    """Sentences printed at the head of the report."""
    bases: dict[str, BaseSpec] = Field(default_factory=dict)
    runs: dict[str, StudyRun] = Field(min_length=1)
    jobs: int = Field(default=1, ge=1)
    """Runs at once, each in processes of its own."""
    seeds: list[int] = Field(default_factory=list)
    """Repeat bases and runs for each seed (pretraining, data and RL); empty: as the configs say."""
