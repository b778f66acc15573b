"""What the batch script makes of each way that training can end. srun and scontrol are stand-ins here; the same is
tested on a real cluster by `make test-slurm`."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = ["train.sbatch", "train_hetjob.sbatch"]
COMMANDS = {
    # Runs what follows its options; like srun it hands signals on, and its status is that of the task.
    "srun": """while [[ $1 == -* ]]; do shift; done
        [[ $1 == true && $DEAD_NODE ]] && exit 1
        for name in USR1 TERM; do trap "early=$name; [[ \\$task ]] && kill -$name \\$task" $name; done
        "$@" & task=$!; [[ $early ]] && kill -$early $task
        while kill -0 $task 2>/dev/null; do wait $task; done; wait $task""",
    "scontrol": 'echo "$*" >>"$SAID"',
    "hostname": "echo node7",
    "urlvr": """echo "$*" >>"$SAID"
        if [[ $1 == rollout ]]; then trap 'echo "servers end" >>"$SAID"; exit 0' TERM; echo up >"$FIFO-rollout"
        elif [[ ! $WAITS ]]; then exit $STATUS
        elif [[ $WAITS == told ]]; then echo up >"$FIFO-train"; read -r <"$FIFO-train"; exit $STATUS
        else trap 'exit $STATUS' USR1; echo up >"$FIFO-train"; fi
        for i in {1..400}; do sleep 0.05; done""",
}


class Job:
    """A batch script that runs with stand-ins."""

    def __init__(self, script: str, folder: Path, **variables: str) -> None:
        for name, body in COMMANDS.items():
            file = folder / name
            file.write_text(f"#!/bin/bash\n{body}\n")
            file.chmod(0o755)
        self.said = folder / "said"
        self.fifo = folder / "fifo"
        for program in ("train", "rollout"):
            os.mkfifo(f"{self.fifo}-{program}")
        settings = {"STATUS": "0", "DEAD_NODE": "", "WAITS": "", "SLURM_JOB_ID": "17", "SLURM_NNODES": "2"}
        environment = {**os.environ, **settings, **variables, "SAID": str(self.said), "FIFO": str(self.fifo)}
        environment["PATH"] = f"{folder}:{environment['PATH']}"
        command = ["bash", str(ROOT / "slurm" / script), "config.yaml", "run.steps=3"]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    def until_up(self, program: str = "train") -> None:
        """Wait for `urlvr PROGRAM` to say that it is up."""
        Path(f"{self.fifo}-{program}").read_text()

    def end(self) -> tuple[int, bool]:
        """(exit code, requeued)."""
        code = self.process.wait(timeout=30)
        return code, "requeue 17" in self.said.read_text().splitlines()


@pytest.mark.parametrize(
    ("status", "dead", "requeued"),
    [
        ("0", "", False),
        ("2", "yes", False),
        ("3", "", False),
        ("4", "", False),
        ("75", "", True),
        ("1", "", False),
        ("1", "yes", True),
        ("5", "yes", True),
        ("137", "yes", True),
    ],
)
def test_only_what_can_go_on_is_requeued(tmp_path, status, dead, requeued):
    assert Job("train.sbatch", tmp_path, STATUS=status, DEAD_NODE=dead).end() == (int(status), requeued)


def test_a_warning_before_the_time_limit_reaches_the_trainer(tmp_path):
    job = Job("train.sbatch", tmp_path, STATUS="75", WAITS="yes")
    job.until_up()
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == (75, True)


def test_a_cancelled_job_stays_cancelled(tmp_path):
    job = Job("train.sbatch", tmp_path, STATUS="75", WAITS="told")
    job.until_up()
    job.process.send_signal(signal.SIGTERM)  # what scancel does to the script, and ...
    Path(f"{job.fifo}-train").write_text("end\n")  # ... to srun's tasks
    assert job.end() == (75, False)


def test_requeues_have_an_end(tmp_path):
    job = Job("train.sbatch", tmp_path, STATUS="75", SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
    assert job.end() == (75, False)


def test_servers_hear_of_their_hosts_and_end_with_the_trainer(tmp_path):
    job = Job("train_hetjob.sbatch", tmp_path, WAITS="yes", STATUS="0")
    job.until_up("rollout")
    job.until_up("train")
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == (0, False)
    said = job.said.read_text().splitlines()
    own = "config.yaml run.steps=3 rollout.engine=sglang servers.pools.policy.host=0.0.0.0 servers.hosts=[node7]"
    assert sorted(said) == sorted([f"rollout serve {own}", f"train {own}", "servers end"])


def test_servers_beside_the_trainer_get_the_gpus_that_ranks_leave(tmp_path):
    sizes = {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "5", "SERVERS": "1"}
    job = Job("train.sbatch", tmp_path, WAITS="yes", **sizes)
    job.until_up("rollout")
    job.until_up("train")
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == (0, False)
    served = next(line for line in job.said.read_text().splitlines() if line.startswith("rollout serve"))
    assert served.endswith("servers.pools.policy.env.CUDA_VISIBLE_DEVICES='5,6,7'")


def test_every_seed_of_an_array_has_a_folder(tmp_path):
    job = Job("train.sbatch", tmp_path, SLURM_ARRAY_TASK_ID="4", RUN_DIR="runs/x")
    assert job.end() == (0, False)
    assert job.said.read_text() == "train config.yaml run.steps=3 run.seed=4 run.dir=runs/x/seed_4\n"


def test_an_array_without_a_folder_says_so(tmp_path):
    job = Job("train.sbatch", tmp_path, SLURM_ARRAY_TASK_ID="4")
    assert job.process.wait(timeout=30) != 0
    assert not job.said.exists()
