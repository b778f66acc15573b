"""One cluster and one base policy for all tests of this folder. Each stage's time is printed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import ROOT, TWO_BY_TWO, URLVR, Cluster, Job, capture, small, timed


def pytest_configure(config: pytest.Config) -> None:
    capture[:] = [config.pluginmanager.get_plugin("capturemanager")]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(Path(os.environ.get("URLVR_SLURM_ROOT", "/tmp/urlvr-slurm-test")))
    made.environment["PATH"] = f"{URLVR.parent}:{made.environment['PATH']}"
    with timed("cluster up, with accounting"):
        done = made.manage("up")
    if done.returncode:
        pytest.exit(done.stderr, returncode=1)
    try:
        yield made
    finally:
        with timed("cluster down"):
            done = made.manage("down")
    assert done.returncode == 0, done.stderr
    assert made.what_is_left() == ""


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's weak policy after a few steps of its pretraining."""
    folder = tmp_path_factory.mktemp("bases")
    change = [f"run.dir={folder}", "run.steps=60", "data.held_out=8"]
    change += ["snapshots.weak=null", "snapshots.base.step=60"]
    with timed("base policy"):
        subprocess.run(
            [str(URLVR), "pretrain", "configs/pretrain_chain_sum.yaml", *change], cwd=ROOT, check=True, timeout=280
        )
    return folder / "base"


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> list[str]:
    """The quickstart, small, in `tmp_path / "run"`."""
    return small(base, tmp_path / "run")


@pytest.fixture(scope="session")
def whole(cluster: Cluster, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """The quickstart by `train.sbatch` on two nodes of two ranks, from its first step to its last: (job, run)."""
    folder = tmp_path_factory.mktemp("whole")
    with timed("train.sbatch on 2 nodes x 2 ranks"):
        job = cluster.submit(
            "train.sbatch", *small(base, folder / "run"), options=TWO_BY_TWO, output=folder / "job.out"
        )
        job.wait()
    return job, folder / "run"
