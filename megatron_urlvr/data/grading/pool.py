"""Comparisons in other processes, each with a time limit: a process that hangs is killed and replaced."""

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Literal

Verdict = Literal["equal", "different", "error", "timeout", "crash"]
START_S = 120.0
"""A process that is not ready after this long is a broken installation, or a machine that is."""


class PoolError(RuntimeError):
    """Comparison processes cannot be started."""


class MathPool:
    """Up to `size` comparison processes, started when first needed. Safe to call from several threads."""

    def __init__(self, *, timeout_s: float, size: int | None = None, script: Path | None = None) -> None:
        self.timeout_s = timeout_s
        self.size = size or default_size()
        self._script = script or Path(__file__).with_name("worker.py")
        self._slots = threading.BoundedSemaphore(self.size)
        self._idle: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _end_all, self._idle)

    @property
    def started(self) -> int:
        """Processes that are alive and idle."""
        return len(self._idle)

    def compare(self, a: str, b: str) -> Verdict:
        """math-verify's verdict on two answers, or how it failed to give one within `timeout_s` seconds."""
        with self._slots:
            try:
                worker = self._idle.pop()
            except IndexError:
                worker = None
            worker = worker or _Worker(self._script, self.timeout_s)
            verdict = worker.ask(a, b, self.timeout_s)
            if worker.alive:
                self._idle.append(worker)
            return verdict

    def close(self) -> None:
        """End all processes. A later comparison starts new ones."""
        _end_all(self._idle)


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, script: Path, limit_s: float) -> None:
        self.alive = True
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        try:
            ready = self._read(START_S) is not None
        except EOFError:
            ready = False
        if not ready:
            self.end()
            raise PoolError(
                f"a math-verify process did not start within {START_S:.0f} s (exit code {self._process.returncode}): "
                f"try `{sys.executable} -c 'import math_verify'`, or set the source's grading.equivalence to exact"
            )

    def ask(self, a: str, b: str, timeout_s: float) -> Verdict:
        """One comparison; after a time-out or crash the process is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([a, b]).encode() + b"\n")
            reply = self._read(timeout_s)
        except (OSError, EOFError):
            self.end()
            return "crash"
        if reply is None:
            self.end()
            return "timeout"
        if "error" in reply:
            return "error"
        return "equal" if reply["equal"] else "different"

    def _read(self, timeout_s: float) -> dict[str, object] | None:
        """The next line as JSON; None when none came in time. EOFError when the process ended."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return None
            chunk = os.read(pipe, 65536)
            if not chunk:
                raise EOFError
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def end(self) -> None:
        """Kill the process and wait for it."""
        self.alive = False
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()


def default_size() -> int:
    """Processes per pool: this rank's share of the machine's cores, four at most."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(4, len(os.sched_getaffinity(0)) // ranks))
