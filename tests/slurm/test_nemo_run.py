"""NeMo-Run launches the quickstart: the same recipe on both executors, and a heterogeneous job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cluster import ROOT, Cluster, metrics, state, timed


@pytest.fixture(scope="session")
def nemo_python() -> str:
    """The Python of NeMo-Run's own environment, made on first use."""
    with timed("NeMo-Run's environment"):
        done = subprocess.run([sys.executable, "servers/nemo_env.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def launch(cluster: Cluster, python: str, folder: Path, *arguments: str) -> None:
    """`urlvr launch nemo ARGUMENTS` in NeMo-Run's environment; jobs find `urlvr` on the path."""
    own = {"NEMORUN_HOME": str(folder / "nemo"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, "-m", "megatron_urlvr.cli", "launch", "nemo", *arguments],
        env=cluster.environment | own,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    logs = "\n".join(file.read_text(errors="replace")[-3000:] for file in (folder / "nemo").rglob("*.out"))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n{logs}"
    assert done.stdout.splitlines()[-1] == "SUCCEEDED"


@pytest.mark.parametrize(
    "executor",
    [
        ["--executor", "local", "--ranks-per-node", "2"],
        ["--executor", "slurm", "--nodes", "2", "--ranks-per-node", "1", "--account", "urlvr", "--time", "60"],
    ],
    ids=["local", "slurm"],
)
def test_both_executors_launch_the_same_recipe(cluster, nemo_python, settings, tmp_path, executor):
    own = ["run.steps=2", "eval.every=0", "rollout.prompts=4"]
    with timed(f"NeMo-Run, {executor[1]} executor"):
        launch(cluster, nemo_python, tmp_path, *settings, *own, *executor)
    assert state(tmp_path / "run")["state"] == "done"
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2]
