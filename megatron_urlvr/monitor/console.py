"""A run's progress for people: a live bar on a terminal, one plain line every few seconds elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL_S = 5.0
"""Seconds between two plain lines: a log of a day's run stays readable."""

_HEADLINES: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("proxy", re.compile(r"reward/proxy"), "{:.3g}"),
    ("accuracy", re.compile(r"eval/[^/]+/avg@\d+"), "{:.3f}"),
    ("entropy", re.compile(r"policy/(sampled_)?entropy"), "{:.3f}"),
    ("s/step", re.compile(r"time/step"), "{:.2f}"),
)
"""What is shown of a step: its name here, the metric it is, its format. The first metric that matches is taken."""


class Headlines:
    """The newest value of each headline metric; evaluation is rare, so its last value stays on show."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}

    def update(self, metrics: Mapping[str, float | None]) -> None:
        """Take what `metrics` has of the headlines; an undefined one (None or NaN) leaves the last value."""
        for title, pattern, form in _HEADLINES:
            for name, value in metrics.items():
                if pattern.fullmatch(name) and value is not None and value == value:
                    self._shown[title] = form.format(value)
                    break

    def __str__(self) -> str:
        order = [title for title, _, _ in _HEADLINES]
        return "  ".join(f"{title} {self._shown[title]}" for title in order if title in self._shown)


class TerminalProgress:
    """A rich progress bar: steps, headline metrics, time left."""

    def __init__(self, name: str, steps: int, console: Console) -> None:
        self._headlines = Headlines()
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[headlines]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(name, total=steps, headlines="")
        self._progress.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the bar to `step`."""
        self._headlines.update(metrics)
        self._progress.update(self._task, completed=step, headlines=str(self._headlines))

    def close(self) -> None:
        """Leave the bar as it is and give the cursor back."""
        self._progress.stop()


class PlainProgress:
    """`name  step 12/100  proxy -2.31  ...` at most every few seconds; the last step is never left out."""

    def __init__(
        self,
        name: str,
        steps: int,
        stream: TextIO | None = None,
        *,
        interval_s: float = PLAIN_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._steps = name, steps
        self._stream = sys.stdout if stream is None else stream
        self._interval_s, self._clock = interval_s, clock
        self._headlines = Headlines()
        self._next = float("-inf")
        self._pending: int | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print a line for `step`, unless the last one is fresh."""
        self._headlines.update(metrics)
        self._pending = step
        if (now := self._clock()) >= self._next:
            self._print()
            self._next = now + self._interval_s

    def close(self) -> None:
        """Print the last step if it was not."""
        self._print()

    def _print(self) -> None:
        if self._pending is None:
            return
        print(f"{self._name}  step {self._pending}/{self._steps}  {self._headlines}", file=self._stream, flush=True)
        self._pending = None


def progress_writer(name: str, steps: int) -> TerminalProgress | PlainProgress:
    """The bar where standard output is a terminal, plain lines where it is not."""
    console = Console()
    return TerminalProgress(name, steps, console) if console.is_terminal else PlainProgress(name, steps)
