"""The batch scripts on a real cluster: ranks, servers, time limits, nodes that die."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from cluster import ROOT, STEPS, TWO_BY_TWO, URLVR, Cluster, Job, metrics, state, timed, until

SUPPORT = ROOT / "tests" / "support"


def test_training_on_two_nodes_of_two_ranks(whole: tuple[Job, Path]):
    job, run = whole
    assert state(run)["state"] == "done"
    assert [row["step"] for row in metrics(run)] == list(range(STEPS + 1))
    assert len(list((run / "checkpoints").glob(f"step_{STEPS:06d}/rng_rank*"))) == 4, "four ranks"
    assert job.field("NumNodes") == "2"
    assert not list((run / "rendezvous").iterdir()), "ranks found each other, and left nothing"


def test_the_time_limit_saves_and_requeues_and_the_end_is_that_of_an_uninterrupted_run(
    cluster: Cluster, whole: tuple[Job, Path], settings: list[str], tmp_path: Path
):
    run = tmp_path / "run"
    options = [*TWO_BY_TWO, "--time=60", "--signal=B:USR1@600"]
    with timed("USR1 before the time limit, requeue, resume"):
        job = cluster.submit("train.sbatch", *settings, options=options, output=tmp_path / "job.out")
        until(lambda: len(metrics(run)) > 2, job.story)
        # Slurm looks at time limits twice a minute; frozen, the run has not ended by then.
        assert len(job.ranks()) == 4
        job.signal(signal.SIGSTOP)
        job.update(TimeLimit="10")
        until(lambda: "the time limit is near" in job.output.read_text(), job.story)
        job.update(TimeLimit="60")
        job.signal(signal.SIGCONT)
        job.wait()
    assert job.field("Restarts") == "1"
    assert "requeued, and resumes by itself" in job.output.read_text()
    assert state(run)["state"] == "done"
    assert metrics(run) == metrics(whole[1])


def test_a_node_that_dies_in_mid_run_is_survived(
    cluster: Cluster, whole: tuple[Job, Path], settings: list[str], tmp_path: Path
):
    run = tmp_path / "run"
    with timed("a node dies, requeue, resume"):
        job = cluster.submit("train.sbatch", *settings, options=TWO_BY_TWO, output=tmp_path / "job.out")
        until(lambda: len(metrics(run)) > 3, job.story)
        lost = cluster.run("scontrol", "show", "hostnames", job.field("NodeList")).split()[1]
        assert cluster.manage("node-down", lost.removeprefix("node")).returncode == 0
        job.wait()
    assert int(job.field("Restarts")) >= 1
    assert lost not in cluster.run("scontrol", "show", "hostnames", job.field("NodeList")).split()
    assert metrics(run) == metrics(whole[1])
    assert cluster.manage("node-up", lost.removeprefix("node")).returncode == 0
    until(lambda: cluster.run("sinfo", "-h", "-N", "-n", lost, "-p", "batch", "-o", "%t") == "idle", job.story)


def test_a_heterogeneous_job_trains_on_some_nodes_and_serves_on_others(
    cluster: Cluster, base: Path, settings: list[str], tmp_path: Path
):
    """Submitted by `urlvr launch slurm`. The server is the fake one of tests/support with the policy's real weights;
    its supervisor, the key, the group that weights travel over and the two groups of the job are real."""
    python_path = f"{SUPPORT / 'fake_environment'}:{SUPPORT}:{ROOT}"
    pool = [f"python={URLVR.with_name('python')}", "device=cpu", "context=64", "concurrency=64"]
    pool += [f"env.PYTHONPATH={python_path}", "env.FAKE_GENERATES=answers"]
    servers = [f"servers.pools.policy.{setting}" for setting in pool]
    own = ["rollout.engine=sglang", "rollout.prompts=4", "rollout.n_votes=4", "run.steps=3", "eval.every=0", *servers]
    command = [str(URLVR), "launch", "slurm", *settings, *own, "--nodes", "2", "--ranks-per-node", "2"]
    command += ["--gpus-per-node", "8", "--time", "60", "--rollout-nodes", "1", "--account", "urlvr"]
    command += ["--partition", "train", "--rollout-partition", "rollout"]
    with timed("trainer and rollout groups on different nodes"):
        said = subprocess.run(command, env=cluster.environment, cwd=ROOT, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        job = Job(cluster, said.stdout.split()[0], tmp_path / "job.out")
        job.output = tmp_path / "run" / "launch" / f"quickstart-{job.id}.out"
        job.wait()
    components = cluster.run("scontrol", "show", "job", "-o", job.id).splitlines()
    assert [field(line, "NodeList") for line in components] == ["node[1-2]", "node3"]
    run = tmp_path / "run"
    assert [path.name for path in (run / "servers").glob("*.log")] == ["policy-node3-0.log"]
    rows = metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["sync/servers"] == 1 for row in rows[1:])
    assert not list((run / "servers").glob("*.json")), "the servers ended with the run"


def field(line: str, name: str) -> str:
    return next(part.partition("=")[2] for part in line.split() if part.startswith(f"{name}="))


def test_seeds_are_an_array_and_their_evaluation_comes_after(cluster: Cluster, settings: list[str], tmp_path: Path):
    run = tmp_path / "run"
    own = ["run.steps=1", "eval.every=0", "rollout.prompts=4", "eval.sets.held_out.size=8"]
    command = [str(URLVR), "launch", "slurm", *settings, *own, "--ranks-per-node", "1", "--gpus-per-node", "0"]
    command += ["--time", "60", "--account", "urlvr", "--seeds", "0-1", "--evaluate"]
    with timed("two seeds, each evaluated after it"):
        said = subprocess.run(command, env=cluster.environment, cwd=ROOT, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        training, evaluation = (line.split()[0] for line in said.stdout.splitlines())
        outputs = [run / "launch" / f"quickstart-eval-{evaluation}_{seed}.out" for seed in (0, 1)]
        jobs = [Job(cluster, f"{evaluation}_{seed}", output) for seed, output in zip((0, 1), outputs, strict=True)]
        for job in jobs:
            job.wait()
    assert [state(run / f"seed_{seed}")["state"] for seed in (0, 1)] == ["done", "done"], training
    assert all("held_out" in job.output.read_text() for job in jobs)
