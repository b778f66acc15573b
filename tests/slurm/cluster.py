"""A Slurm cluster on this machine, and jobs on it, as tests see them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "local_cluster.sh"
URLVR = Path(sys.executable).with_name("urlvr")
STEPS = 8
TWO_BY_TWO = ["--nodes=2", "--ntasks-per-node=2"]
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
JOB_S = 400
"""A job takes half a minute alone, and minutes on a busy machine."""

capture: list[Any] = []
"""pytest's manager of captured output, which conftest.py finds."""


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print what a stage took, past pytest's capture."""
    started = time.monotonic()
    yield
    with capture[0].global_and_fixture_disabled():
        print(f"\n[{what}: {time.monotonic() - started:.0f} s]", flush=True)


def small(base: Path, run: Path) -> list[str]:
    """The quickstart from `base`, small, in the folder `run`."""
    return [
        "configs/quickstart.yaml",
        f"model.path={base}",
        f"run.dir={run}",
        f"run.steps={STEPS}",
        "eval.every=4",
        "eval.sets.held_out.size=32",
        "checkpoint.every=2",
        "monitor.tensorboard=false",
    ]


class Cluster:
    """The running cluster. `environment` is what its clients need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "URLVR_SLURM_ROOT": str(folder), "OMP_NUM_THREADS": "1"}
        self.environment |= {"SLURM_CONF": str(folder / "etc" / "slurm.conf"), "ACCOUNTING": "1", "NODES": "4"}

    def manage(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`slurm/local_cluster.sh ARGUMENTS`."""
        return subprocess.run([str(SCRIPT), *arguments], env=self.environment, capture_output=True, text=True)

    def run(self, *command: str) -> str:
        """What a command says on standard output. CalledProcessError when it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, script: str, *arguments: str, options: Sequence[str] = (), output: Path) -> Job:
        """`sbatch OPTIONS slurm/SCRIPT ARGUMENTS`."""
        command = ["sbatch", "--parsable", f"--output={output}", *options, str(ROOT / "slurm" / script), *arguments]
        return Job(self, self.run(*command), output)

    def what_is_left(self) -> str:
        """Everything that a cluster which was taken down should not have left."""
        found = [f"{self.folder} exists"] if self.folder.exists() else []
        found += [line for line in self._said("ip", "netns", "list") if "urlvr" in line]
        found += [line for line in self._said("ip", "-o", "link") if "urlvr" in line]
        found += [line for line in self._said("ps", "-eo", "pid,stat,args") if str(self.folder) in line]
        return "\n".join(found)

    def _said(self, *command: str) -> list[str]:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@dataclass
class Job:
    """A submitted job."""

    cluster: Cluster
    id: str
    output: Path

    def field(self, name: str) -> str:
        """A field of `scontrol show job`; of the first component of a heterogeneous job."""
        shown = self.cluster.run("scontrol", "show", "job", "-o", self.id).splitlines()[0]
        found = re.search(rf"(?:^| ){name}=(\S*)", shown)
        assert found, shown
        return found[1]

    def update(self, **fields: str) -> None:
        """`scontrol update`."""
        self.cluster.run("scontrol", "update", f"jobid={self.id}", *(f"{name}={v}" for name, v in fields.items()))

    def wait(self) -> None:
        """Until it is completed; anything else fails the test with what the job printed."""
        until(lambda: self.field("JobState") in ENDED, self.story)
        assert self.field("JobState") == "COMPLETED", self.story()

    def story(self) -> str:
        """What happened, for a failed test."""
        printed = self.output.read_text(errors="replace") if self.output.exists() else "(no output)"
        return f"job {self.id}: {self.field('JobState')} {self.field('Reason')}\n{printed[-6000:]}"

    def ranks(self) -> list[int]:
        """Process ids, on this machine, of the job's trainer ranks."""
        found = []
        for process in Path("/proc").iterdir():
            if not process.name.isdigit():
                continue
            try:
                command = (process / "cmdline").read_bytes().split(b"\0")
                variables = (process / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended in the meantime
                continue
            is_rank = b"python" in command[0] and command[1].endswith(b"/urlvr") if b"train" in command[2:] else False
            if is_rank and f"SLURM_JOB_ID={self.id}".encode() in variables:
                found.append(int(process.name))
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send all ranks a signal."""
        for rank in self.ranks():
            os.kill(rank, number)


def until(condition: Callable[[], bool], story: Callable[[], str], limit_s: float = JOB_S) -> None:
    """Wait for what happens in other processes."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s\n{story()}"
        time.sleep(0.2)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what depends on the clock."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # the last may be half written
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def state(run: Path) -> Mapping[str, Any]:
    """status.json."""
    return dict(json.loads((run / "status.json").read_text()))
