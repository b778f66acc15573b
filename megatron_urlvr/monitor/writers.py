"""Where a run's metrics go: metrics.jsonl, TensorBoard, Weights & Biases and the console, one `log` call a step."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from megatron_urlvr.config.monitor import MonitorSection
from megatron_urlvr.exit_codes import UnusableInput

from .console import progress_writer

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"


class MissingPackageError(UnusableInput):
    """A package that a setting asks for is not installed."""


class MetricWriter(Protocol):
    """One destination of metrics. Steps arrive in increasing order."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take one step's metrics. NaN means undefined at this step."""

    def close(self) -> None:
        """Flush and release."""


class JsonlWriter:
    """Appends one JSON object a step: `{"step": 12, <metrics in alphabetical order>}`, flushed each line.

    A value that is not finite is written as null, since JSON has no NaN: an accuracy among parsed answers when none
    was parsed is undefined, and not zero.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line. OSError when it cannot be written: a run does not go on without its record."""
        row: dict[str, float | None] = {"step": step}
        row |= {name: value if math.isfinite(value := metrics[name]) else None for name in sorted(metrics)}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardWriter:
    """Scalars for TensorBoard under the metrics' own names; a resumed run purges the steps it takes again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one scalar a metric; undefined ones leave a gap."""
        if self._writer is None:
            # Opened at the first step: only then is it known which steps of an earlier process are void.
            resumed = any(self._folder.glob("events.out.tfevents.*"))
            self._writer = SummaryWriter(str(self._folder), purge_step=step if resumed else None, flush_secs=10)
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()


class WandbWriter:
    """A Weights & Biases run that a resumed training run continues: its id is kept in the run folder."""

    def __init__(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        wandb = _import_wandb()
        kept = run_dir / "wandb" / "run_id"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(uuid.uuid4().hex[:12] + "\n")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "megatron_urlvr"),
            name=name,
            id=kept.read_text().strip(),
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one step. Steps that the server already has, after a resume from an older checkpoint, it drops itself."""
        self._run.log({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """Mark the run finished and wait for its upload."""
        self._run.finish()


class Writers:
    """Fans one step's metrics out to every writer. With no writers (ranks other than 0) it takes and drops them."""

    def __init__(self, writers: Sequence[MetricWriter]) -> None:
        self._writers = list(writers)
        self._last: int | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's metrics, floats by name. Called once a step, in increasing order.

        Raises ValueError for a step that does not follow, TypeError for a value that is no number.
        """
        if self._last is not None and step <= self._last:
            raise ValueError(f"metrics of step {step} were logged after those of step {self._last}: one call a step")
        values: dict[str, float] = {}
        for name, value in metrics.items():
            if not isinstance(value, Real):
                raise TypeError(f"metric {name!r} is a {type(value).__name__}; writers take floats")
            values[name] = float(value)
        for writer in self._writers:
            writer.log(step, values)
        self._last = step

    def close(self) -> None:
        """Close every writer, also when one of them fails; the first failure is raised at the end."""
        failures: list[Exception] = []
        while self._writers:
            try:
                self._writers.pop().close()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]


def build_writers(
    run_dir: Path, monitor: MonitorSection, *, config: Mapping[str, Any], console: bool, rank: int = 0
) -> Writers:
    """The writers that `monitor` asks for; metrics.jsonl is always among them. Call before step 0.

    `config` is the resolved run config as a plain dict: `run.name` and `run.steps` head the progress display, and
    Weights & Biases keeps all of it. Only rank 0 writes; other ranks get writers that drop everything.
    Raises MissingPackageError when `monitor.wandb` is on and the package is not installed.
    """
    if rank != 0:
        return Writers([])
    name, steps = str(config["run"]["name"]), int(config["run"]["steps"])
    writers: list[MetricWriter] = []
    if monitor.wandb:  # first: it can be refused, and nothing has been written then
        writers.append(WandbWriter(run_dir, name, config))
    writers.append(JsonlWriter(run_dir / METRICS_FILE))
    if monitor.tensorboard:
        writers.append(TensorBoardWriter(run_dir / TENSORBOARD_DIR))
    if console:
        writers.append(progress_writer(name, steps))
    return Writers(writers)


def _import_wandb() -> ModuleType:
    try:
        import wandb
    except ImportError as error:
        raise MissingPackageError(
            "monitor.wandb is true, but the package wandb is not installed: "
            "pip install 'megatron-urlvr[wandb]', or set monitor.wandb=false"
        ) from error
    return wandb
