"""Batch scripts for Slurm: what `slurm/` holds for any config, filled in for one, and submitted.

`slurm/*.sbatch` are these scripts for a job without a config; `python -m megatron_urlvr.launch.slurm slurm` writes
them.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..exit_codes import UnusableInput

GENERIC = ("train.sbatch", "train_hetjob.sbatch", "eval.sbatch")
SEEDS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*(%\d+)?")
TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")


@dataclass(frozen=True)
class SlurmJob:
    """One job: what it runs, and what it asks of the cluster. The defaults are those of the generic scripts."""

    name: str = "urlvr"
    arguments: tuple[str, ...] = ()
    """Config and overrides, quoted for the shell. Empty: the script takes them as its own arguments."""
    run_dir: str = ""
    """The run's folder; with `seeds` the one that holds a folder for each. Needed with `arguments`."""
    nodes: int = 1
    """Nodes of the trainer."""
    ranks_per_node: int = 8
    gpus_per_node: int = 8
    rollout_nodes: int = 0
    """Further nodes, for rollout servers alone."""
    servers: bool = False
    """Rollout servers on the trainer's nodes."""
    time: str = "24:00:00"
    signal_s: int = 300
    """Seconds before the time limit at which the run saves and is requeued. Slurm may be a minute early."""
    partition: str = ""
    rollout_partition: str = ""
    account: str = ""
    qos: str = ""
    seeds: str = ""
    """Slurm's form of an array, such as `0-4` or `0-9%3`: one run for each."""
    image: str = ""
    mounts: str = ""
    setup: tuple[str, ...] = ()
    """Lines of shell before everything else, such as the activation of an environment."""
    evaluates: bool = False
    """Run `urlvr eval` on the last checkpoint instead of `urlvr train`."""

    @property
    def output(self) -> str:
        """Where the job writes what it prints, as a pattern of Slurm's; in the folder of submission without a run."""
        name = "%x-%A_%a.out" if self.seeds else "%x-%j.out"
        return f"{self.run_dir}/launch/{name}" if self.run_dir else name


def check(job: SlurmJob) -> None:
    """UnusableInput, with a sentence for everything that Slurm would not take."""
    problems = []
    if not TIME.fullmatch(job.time):
        problems.append(f"--time {job.time}: give minutes, hours:minutes:seconds or days-hours:minutes:seconds.")
    if job.seeds and not SEEDS.fullmatch(job.seeds):
        problems.append(f"--seeds {job.seeds}: give numbers and ranges, such as 0-4 or 1,3,5 or 0-9%3 (three at once).")
    if job.seeds and job.rollout_nodes:
        problems.append("--seeds with --rollout-nodes: Slurm has no arrays of heterogeneous jobs; submit one a seed.")
    if job.servers and job.rollout_nodes:
        problems.append("--servers with --rollout-nodes: servers are either on the trainer's nodes or on their own.")
    if job.mounts and not job.image:
        problems.append(f"--mounts {job.mounts} without --image: there is no container to mount into.")
    words = (job.name, job.partition, job.rollout_partition, job.account, job.qos, job.run_dir, job.image, job.mounts)
    unsafe = [value for value in words if _unsafe(value)]
    problems += [f"{value!r} holds spaces or signs that a batch script does not take." for value in unsafe]
    if problems:
        raise UnusableInput("\n".join(problems))


def _unsafe(value: str) -> bool:
    return re.fullmatch(r"[\w./+=:,@#-]*", value) is None


def render(job: SlurmJob) -> str:
    """The batch script. UnusableInput when the job cannot be one."""
    check(job)
    environment = Environment(
        loader=PackageLoader("megatron_urlvr.launch"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(f"{template_name(job)}.j2").render(job=job).lstrip()


def template_name(job: SlurmJob) -> str:
    """The generic script that this one is filled in from."""
    if job.evaluates:
        return "eval.sbatch"
    return "train_hetjob.sbatch" if job.rollout_nodes else "train.sbatch"


def evaluation_of(job: SlurmJob) -> SlurmJob:
    """The job that evaluates what `job` trains."""
    return replace(job, name=f"{job.name}-eval", arguments=(shlex.quote(job.run_dir),), evaluates=True)


def write(job: SlurmJob) -> Path:
    """Write the script to the run's folder; returns its path."""
    path = Path(job.run_dir) / "launch" / template_name(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(job), encoding="utf-8")
    return path


def submit(script: Path, *, after: str = "", each: bool = False) -> str:
    """Submit; returns the job's id. `after`: only when that job has ended well (`each`: task by task of its array).

    UnusableInput with what sbatch says when it does not take the script.
    """
    dependency = [f"--dependency={'aftercorr' if each else 'afterok'}:{after}", "--kill-on-invalid-dep=yes"]
    command = ["sbatch", "--parsable", *(dependency if after else []), str(script)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UnusableInput("there is no sbatch here: run this where Slurm is, or --dry-run.") from error
    if done.returncode:
        raise UnusableInput(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().split(";")[0]


def generic(name: str) -> str:
    """The script `name` of `slurm/`, which takes a config as its argument."""
    job = SlurmJob(rollout_nodes=1 if name == "train_hetjob.sbatch" else 0, evaluates=name == "eval.sbatch")
    return render(job)


def main(folder: Path) -> None:
    """Write the generic scripts into `folder`."""
    for name in GENERIC:
        (folder / name).write_text(generic(name), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
