"""Runs commands side by side, a few at a time, each in a process group of its own; a signal ends them resumably."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from megatron_urlvr.exit_codes import ExitCode

State = Literal["waiting", "running", "done", "failed", "blocked", "interrupted"]
FINISHED = (ExitCode.DONE, ExitCode.STOPPED)
"""Exit codes of a job that came to its end; a run that a monitor stopped has an outcome, and is no failure."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
POLL_S = 0.1


@dataclass(frozen=True)
class Job:
    """One command. Its output goes to `log`."""

    name: str
    command: tuple[str, ...]
    log: Path
    after: tuple[str, ...] = ()
    """Jobs that must be done before it starts."""
    obstacle: Callable[[], str | None] = lambda: None
    """Asked when it could start: a sentence why it cannot."""
    steps: int | None = None
    """Training steps of the command; None where it has no metrics."""
    metrics: Path | None = None
    """The metrics.jsonl that it writes."""


@dataclass(frozen=True)
class Outcome:
    """How a job stands."""

    state: State
    exit_code: int | None = None
    reason: str = ""
    seconds: float = 0.0


class Watcher(Protocol):
    """Shows what happens. Called from the scheduler's thread."""

    def started(self, job: Job) -> None: ...
    def tick(self, running: Sequence[Job]) -> None: ...
    def ended(self, job: Job, outcome: Outcome) -> None: ...
    def message(self, text: str) -> None: ...


class Scheduler:
    """Starts each job once all it waits for are done and a slot is free. One failure stops nothing that does not
    depend on it. The first signal is passed on to the running jobs as SIGTERM, and no more are started; a second
    kills them."""

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        slots: int,
        environment: Mapping[str, str],
        watcher: Watcher,
        limit_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limit_s`: start nothing so long after `run` began; what runs then ends in its own time."""
        self.jobs = {job.name: job for job in jobs}
        self.outcomes: dict[str, Outcome] = {name: Outcome("waiting") for name in self.jobs}
        self._slots, self._environment, self._watcher = slots, dict(environment), watcher
        self._running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self._received = self._passed_on = 0
        self._limit_s, self._clock, self._began = limit_s, clock, 0.0

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the work early."""
        return any(outcome.state == "interrupted" for outcome in self.outcomes.values())

    @property
    def signalled(self) -> bool:
        """Whether a signal came."""
        return self._received > 0

    def run(self) -> dict[str, Outcome]:
        """Run every job to its end. Returns the outcomes by name."""
        self._began = self._clock()
        with self._handling_signals():
            while True:
                self._start_ready()
                self._pass_signals_on()  # after starting, so that no job slips in between
                if not self._running:
                    break
                self._reap()
                self._watcher.tick([self.jobs[name] for name in self._running])
                time.sleep(POLL_S)
        return self.outcomes

    # -- starting and ending ------------------------------------------------------------------------------------------

    def _start_ready(self) -> None:
        progressed = True
        while progressed:  # a job that cannot start may block others, which then end at once too
            progressed = False
            for name, job in self.jobs.items():
                if self.outcomes[name].state != "waiting":
                    continue
                if self._received or self._is_late():
                    self._end(job, Outcome("interrupted", reason="not started"))
                elif unmet := [each for each in job.after if self.outcomes[each].state in ("failed", "blocked")]:
                    self._end(job, Outcome("blocked", reason=f"it needs {unmet[0]}, which {self._why(unmet[0])}"))
                    progressed = True
                elif len(self._running) < self._slots and self._are_done(job.after):
                    self._start(job)

    def _is_late(self) -> bool:
        """Whether the time to start something is over."""
        return self._limit_s is not None and self._clock() - self._began >= self._limit_s

    def _why(self, name: str) -> str:
        return "failed" if self.outcomes[name].state == "failed" else "could not start"

    def _are_done(self, names: Sequence[str]) -> bool:
        return all(self.outcomes[name].state == "done" for name in names)

    def _start(self, job: Job) -> None:
        if obstacle := job.obstacle():
            self._end(job, Outcome("failed", reason=obstacle))
            return
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab", buffering=0) as log:
            log.write(f"$ {shlex.join(job.command)}\n".encode())  # tells this attempt from earlier ones
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which passes it on
            )
        self._running[job.name] = (process, time.monotonic())
        self.outcomes[job.name] = Outcome("running")
        self._watcher.started(job)

    def _reap(self) -> None:
        for name, (process, began) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[name]
            if code != 0:  # helpers of a process that died do not always notice
                _signal_group(process.pid, signal.SIGTERM)
            self._end(self.jobs[name], self._outcome(self.jobs[name], code, time.monotonic() - began))

    def _outcome(self, job: Job, code: int, seconds: float) -> Outcome:
        if code in FINISHED:
            return Outcome("done", code, seconds=seconds)
        if self._received:
            return Outcome("interrupted", code, "continues when the study is run again", seconds)
        return Outcome("failed", code, _reason(job, code), seconds)

    def _end(self, job: Job, outcome: Outcome) -> None:
        self.outcomes[job.name] = outcome
        self._watcher.ended(job, outcome)

    # -- signals ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _handling_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received += 1

    def _pass_signals_on(self) -> None:
        """The first signal asks the jobs to end, by their leaders alone: helpers are a leader's own affair. The next
        ones kill them with their helpers."""
        if self._received == self._passed_on:
            return
        first, self._passed_on = self._passed_on == 0, self._received
        if first:
            self._watcher.message("stopping: running jobs save what they have; once more kills them")
        for process, _ in self._running.values():
            if first:
                process.send_signal(signal.SIGTERM)
            else:
                _signal_group(process.pid, signal.SIGKILL)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _reason(job: Job, code: int) -> str:
    """Exit code or signal in words, and the last line that the job wrote."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    last = last_line(job.log)
    return f"{how}: {last}" if last else how


def last_line(log: Path, pattern: str = "") -> str:
    """The last line of the newest attempt in `log` that says anything, and has `pattern` in it; empty when there is
    none."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    for line in map(str.strip, reversed(lines)):
        if line.startswith("$ "):
            break
        if line and re.search(pattern, line):
            return line
    return ""
