"""`run.branch_from`: a run that goes on from another one's checkpoint, with other settings.

The checkpoint and the history up to it are copied into the new run's folder, which then resumes like any other. Data
and model must be the parent's: what a resumed run checks about them is checked here too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ..config.errors import ConfigError
from ..config.loader import load_config
from ..config.root import Config
from ..exit_codes import UnusableInput
from .changes import differences
from .folder import RunDir, write_bytes
from .step_lines import StepLines


def branch(config: Config, folder: RunDir, *, checkpoints: list[tuple[int, Path]]) -> None:
    """Make `folder` the beginning of a run that branches off, under its lock and on one rank. Nothing happens where
    `run.branch_from` is null, or the folder holds a checkpoint (`checkpoints`: its own), or another run.

    UnusableInput when the parent has no such checkpoint.
    """
    if config.run.branch_from is None or checkpoints or not _is_ours(config, folder):
        return
    run, _, step = config.run.branch_from.rpartition("@")
    parent, at = RunDir(run), int(step)
    source = _checkpoint_of(parent, at, config.run.branch_from)
    folder.write_config(config)
    for name in ("provenance.json", "metrics.jsonl"):
        _copy(parent.path / name, folder.path / name)
    for name in config.eval.sets:
        _copy(parent.evaluations(name), folder.evaluations(name))
        StepLines(folder.evaluations(name)).truncate(at)
    StepLines(folder.metrics).truncate(at)
    target = folder.checkpoint(at)
    unfinished = target.with_name(f".{target.name}.branching")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished)
    unfinished.rename(target)  # last: until it is there, the same command begins again
    print(f"branched off {parent.path} after step {at}", flush=True)


def _is_ours(config: Config, folder: RunDir) -> bool:
    """Whether the folder is empty, or an earlier start of this very run; another run is left for the caller to find."""
    if not folder.config.exists():
        return not StepLines(folder.metrics).rows()
    try:
        refused, _ = differences(load_config(folder.config), config)
    except ConfigError:
        return False
    return not refused


def _checkpoint_of(parent: RunDir, step: int, given: str) -> Path:
    for place in (parent.checkpoint(step), parent.snapshots / parent.checkpoint(step).name):
        if place.is_dir():
            return place
    there = [path for folder in (parent.checkpoints, parent.snapshots) for path in sorted(folder.glob("step_*"))]
    known = [str(int(path.name.removeprefix("step_"))) for path in there]
    raise UnusableInput(
        f"run.branch_from = {given}: {parent.path} has no checkpoint after step {step}."
        f" It has {', '.join(known) or 'none'}; checkpoint.every and checkpoint.keep say which are kept."
    )


def _copy(source: Path, target: Path) -> None:
    """Copy a file that may not be there."""
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, source.read_bytes())
