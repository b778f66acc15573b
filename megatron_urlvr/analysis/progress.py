"""Live progress of several jobs: bars on a terminal, plain lines elsewhere, from the files that the jobs write."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from megatron_urlvr.monitor.console import Headlines

from .scheduler import Job, Outcome, last_line

PLAIN_INTERVAL_S = 15.0
PROGRESS = r"\bstep \d+[:/]"
"""In a log, lines of progress name their step; warnings and other programs' bars do not."""
_BAR_TEXT = 60
"""Most characters of a log line beside a bar."""


class Tail:
    """What a growing metrics.jsonl says by now: its last step and headline metrics."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._rest = path, 0, b""
        self.step = 0
        self.headlines = Headlines()

    def read(self) -> None:
        """Take the lines that were added. A file that shrank was cut by a resumed run, and is read anew."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return
        if size < self._offset:
            self._offset, self._rest = 0, b""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            added = file.read()
        self._offset += len(added)
        *lines, self._rest = (self._rest + added).split(b"\n")
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.step = int(row.pop("step", self.step))
            self.headlines.update(row)


class _Tails:
    """A tail for each job that has metrics."""

    def __init__(self) -> None:
        self._tails: dict[str, Tail] = {}

    def text(self, job: Job) -> tuple[int, str]:
        """(step, what to show) of a job: headline metrics, or where there are none the last line of progress in its
        log."""
        if job.metrics is None:
            return 0, last_line(job.log, PROGRESS)
        tail = self._tails.setdefault(job.name, Tail(job.metrics))
        tail.read()
        return tail.step, str(tail.headlines)


class TerminalWatcher:
    """One bar a job."""

    def __init__(self, console: Console) -> None:
        self._tails, self._bars = _Tails(), dict[str, TaskID]()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
        )

    def __enter__(self) -> TerminalWatcher:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def started(self, job: Job) -> None:
        """A bar for `job`; one that moves to and fro where steps are not known."""
        self._bars[job.name] = self._progress.add_task(job.name, total=job.steps, text="")

    def tick(self, running: Sequence[Job]) -> None:
        """Move the bars."""
        for job in running:
            step, text = self._tails.text(job)
            self._progress.update(self._bars[job.name], completed=step, text=text[:_BAR_TEXT])

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Leave the bar with how the job ended."""
        if job.name not in self._bars:
            self.message(f"{job.name} {outcome.state}: {outcome.reason}")
            return
        step, text = self._tails.text(job)
        total = job.steps if job.steps is not None else 1
        completed = total if job.steps is None and outcome.state == "done" else step
        shown = text[:_BAR_TEXT] if outcome.state == "done" else f"{outcome.state}: {outcome.reason}"
        bar = self._bars[job.name]
        self._progress.update(bar, total=total, completed=completed, text=shown)
        self._progress.stop_task(bar)

    def message(self, text: str) -> None:
        """Print above the bars."""
        self._progress.console.print(text, markup=False, highlight=False)


class PlainWatcher:
    """A line when a job starts or ends, and now and then one for each that runs."""

    def __init__(
        self,
        write: Callable[[str], None] = lambda text: print(text, flush=True),
        *,
        interval_s: float = PLAIN_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._interval_s, self._clock = write, interval_s, clock
        self._tails = _Tails()
        self._next = clock() + interval_s

    def __enter__(self) -> PlainWatcher:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def started(self, job: Job) -> None:
        """`weak started`."""
        self._write(f"{job.name} started")

    def tick(self, running: Sequence[Job]) -> None:
        """Where every running job stands, unless that was just said."""
        if (now := self._clock()) < self._next:
            return
        self._next = now + self._interval_s
        for job in running:
            step, text = self._tails.text(job)
            where = f"step {step}/{job.steps}  " if job.steps is not None else ""
            self._write(f"{job.name}  {where}{text}" if where or text else f"{job.name} runs")

    def ended(self, job: Job, outcome: Outcome) -> None:
        """`weak done after 31 s`, or why not."""
        text = f" after {outcome.seconds:.0f} s" if outcome.exit_code is not None else ""
        reason = f": {outcome.reason}" if outcome.reason else ""
        self._write(f"{job.name} {outcome.state}{text}{reason}")

    def message(self, text: str) -> None:
        """One line."""
        self._write(text)


def job_watcher() -> TerminalWatcher | PlainWatcher:
    """Bars where standard output is a terminal, plain lines where it is not."""
    console = Console()
    return TerminalWatcher(console) if console.is_terminal else PlainWatcher()
