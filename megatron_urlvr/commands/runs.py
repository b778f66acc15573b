"""`urlvr runs`: one line for each run under a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_urlvr.analysis.curves import Summary
from megatron_urlvr.analysis.runs import RunError, RunRecord, load_run, reward_text
from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.run.folder import RunDir

COLUMNS = ("run", "reward", "seed", "steps", "set", "start", "peak", "end", "verdict", "state")
PIPE_WIDTH = 400
"""Columns of the output where it is no terminal: nothing is cut off for the next program."""


@dataclass(frozen=True)
class RunLine:
    """What the table says of one run; a text that does not apply is empty."""

    path: Path
    cells: tuple[str, ...]
    """In the order of COLUMNS."""


def print_runs(folder: Path) -> None:
    """Print the table of the runs in `folder`. UnusableInput when there are none."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD)
    for line in run_lines(folder):
        table.add_row(*(Text(cell) for cell in line.cells))
    console.print(table)


def run_lines(folder: Path) -> list[RunLine]:
    """The runs at any depth in `folder`, sorted by path. UnusableInput when there are none."""
    if not folder.is_dir():
        raise UnusableInput(f"there is no folder {folder}: give the one that holds runs, such as `urlvr runs runs`.")
    found = [RunLine(path, _cells(path, folder)) for path in find_runs(folder)]
    if not found:
        raise UnusableInput(f"{folder} holds no runs: a run is a folder with config.yaml and status.json.")
    return found


def find_runs(folder: Path) -> Iterator[Path]:
    """Folders with a config and a status, `folder` itself included; what lies inside a run is not searched."""
    for path, subfolders, files in os.walk(folder):
        subfolders.sort()
        if {"config.yaml", "status.json"} <= set(files):
            subfolders.clear()
            yield Path(path)


def _cells(path: Path, folder: Path) -> tuple[str, ...]:
    name = str(path.relative_to(folder)) if path != folder else path.name
    try:
        run = load_run(path)
    except RunError as error:
        return (name, *[""] * (len(COLUMNS) - 2), f"unreadable: {error}")
    done, planned = run.status.get("step", 0), run.config["run"].get("steps", "?")
    eval_set = next(iter(run.eval_sets), None)
    summary = run.summary(eval_set) if eval_set is not None else None
    return (
        name,
        reward_text(run.config),
        str(run.seed),
        f"{done}/{planned}",
        eval_set or "",
        *_figures(summary),
        state_of(run),
    )


def _figures(summary: Summary | None) -> tuple[str, str, str, str]:
    if summary is None:
        return "", "", "", "not evaluated"
    peak = f"{summary.peak:.3f} @ {summary.peak_step}"
    return f"{summary.start:.3f}", peak, f"{summary.end:.3f}", summary.verdict


def state_of(run: RunRecord) -> str:
    """The state in a word or two. A run that says it is running, and that no process holds, was killed."""
    state = str(run.status.get("state", "unknown"))
    if state == "running" and not RunDir(run.path).in_use():
        return "interrupted, resumable"
    reason = run.status.get("reason")
    return f"{state}: {reason}" if reason and state not in ("running", "done") else state
