"""Python programs that nobody wrote, run in a process that can do nothing but compute.

    run_python(source) ─► python -I sandbox_worker.py ─► limits, system-call filter ─► exec(source) ─► "passed"

What bounds it: a clock (its whole session is killed), processor seconds, memory, and a list of system calls (seccomp)
that holds none which changes anything outside of it: no processes, sockets, writing, changing of files' data or names
or owners or times, no signals to others. It says how it ended in one page of shared memory and has no open file but
/dev/null, so that nothing it prints is read by anybody. It may read files. Whoever shares the process with a test can
in principle forge its outcome; what a filter cannot see is whether the tests are good.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

WORKER = Path(__file__).with_name("sandbox_worker.py")
ARCHITECTURES = ("x86_64", "aarch64")
START_S = 20.0
"""Added to the clock alone: a busy machine may take long to start Python."""
UNSTARTED = 97
"""Exit code of a worker that could not put its limits in place."""
PAGE = 4096
"""Bytes in which a worker says how its program ended: all that is ever read of it."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float
    memory_mb: int


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    kind: Literal["passed", "failed", "time", "memory", "killed"]
    """`failed`: it raised, or ended before its last line; `killed`: it ended itself in another way."""
    detail: str

    @property
    def stopped(self) -> bool:
        """A limit ended it."""
        return self.kind in ("time", "memory", "killed")


class SandboxError(RuntimeError):
    """The sandbox itself does not work here."""


def why_unavailable() -> str | None:
    """Why programs cannot be run here, a sentence; None when they can."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        return (
            f"the provider unit_tests needs Linux on {' or '.join(ARCHITECTURES)}, whose system calls it filters, and "
            f"this is {platform.system()} on {platform.machine()}: check answers another way"
        )
    return None


def run_python(source: str, limits: Limits) -> Outcome:
    """Run `source` to its end, under `limits`. SandboxError when the limits cannot be put in place."""
    token = secrets.token_hex(16)
    page = os.memfd_create("urlvr-sandbox")
    try:
        os.ftruncate(page, PAGE)
        code = _run(f"{token}\n{source}".encode(), limits, page)
        said = os.pread(page, PAGE, 0).rstrip(b"\0").decode("utf-8", "replace")
    finally:
        os.close(page)
    return _outcome(said, token, code, limits)


def _run(source: bytes, limits: Limits, page: int) -> int | None:
    """Run the worker until it ends, or the clock ends it. Its exit code; None when its time was over."""
    with tempfile.TemporaryDirectory(prefix="urlvr-sandbox-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WORKER), str(limits.seconds), str(limits.memory_mb << 20), str(page)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(page,),
            cwd=folder,
            env={"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            process.communicate(source, timeout=limits.seconds + START_S)
            return process.returncode
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of the program's session, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _outcome(said: str, token: str, code: int | None, limits: Limits) -> Outcome:
    if code == UNSTARTED:
        raise SandboxError(f"the limits of the sandbox cannot be put in place: {said}")
    if said == token:
        return Outcome("passed", "")
    if said == "memory":
        return Outcome("memory", f"more than {limits.memory_mb} MB")
    if code is None or code in (-signal.SIGXCPU, -signal.SIGALRM, -signal.SIGKILL):
        return Outcome("time", f"longer than {limits.seconds:g} s")
    if code < 0:
        return Outcome("killed", f"signal {signal.Signals(-code).name}")
    return Outcome("failed", said[:80])
