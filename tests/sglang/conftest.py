"""Two real SGLang servers for all tests of this folder, started as a user starts them: by `urlvr rollout serve`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_contract import VOCAB, Target
from supervised import ROOT, Served

from megatron_urlvr.config.loader import load_config
from megatron_urlvr.config.pretrain import PretrainConfig
from megatron_urlvr.pretrain import main as pretrain

SERVERS = 2
REWARDS = [
    "reward.statistics=servers",
    'reward.terms.entropy={"name": "token_entropy", "aggregation": "mean"}',
    'reward.terms.certainty={"name": "self_certainty", "aggregation": "mean"}',
]
"""Rewards that need all of the servers' statistics."""
PRETRAIN = [
    "run.steps=80",
    "run.batch=64",
    "data.held_out=8",
    "model={layers: 2, hidden: 32, ffn: 64, heads: 4, kv_heads: 2}",
    "optim.lr=5.0e-3",
    "optim.warmup_steps=10",
    "snapshots.weak=null",
    "snapshots.base.step=80",
]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that has begun to learn: an audit of random weights would agree with anything."""
    folder = tmp_path_factory.mktemp("bases")
    pretrain(
        load_config(ROOT / "configs" / "pretrain_chain_sum.yaml", [*PRETRAIN, f"run.dir={folder}"], PretrainConfig)
    )
    assert json.loads((folder / "base" / "config.json").read_text())["vocab_size"] == VOCAB
    return folder / "base"


@pytest.fixture(scope="session")
def served(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    run = tmp_path_factory.mktemp("sglang") / "run"
    run.mkdir()
    python = os.environ.get("URLVR_SGLANG_PYTHON")
    assert python, "URLVR_SGLANG_PYTHON is not set: run these tests with `make test-sglang`"
    command = [sys.executable, "-m", "megatron_urlvr.cli", "rollout", "serve"]
    command += [str(ROOT / "configs" / "quickstart_sglang.yaml"), f"model.path={base}", f"run.dir={run}"]
    command += [f"servers.pools.policy.count={SERVERS}", *REWARDS]
    with (run / "serve.log").open("w") as log:
        supervisor = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
    served = Served(base, run, supervisor)
    try:
        served.wait_for(SERVERS)
        yield served
    finally:
        supervisor.send_signal(signal.SIGTERM)
        supervisor.wait(timeout=60)


@pytest.fixture
def sglang_server(served: Served) -> Target:
    return Target(served.wait()["url"], served.folder)
