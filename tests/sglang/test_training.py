"""Training against a real server: the weights it samples from are the policy's, step after step, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from supervised import ROOT, Served

from megatron_urlvr.assembly import build
from megatron_urlvr.config.loader import load_config
from megatron_urlvr.config.root import Config
from megatron_urlvr.exchange import hand_over
from megatron_urlvr.interrupts import Interrupts
from megatron_urlvr.layout import start
from megatron_urlvr.policy.batch import Row
from megatron_urlvr.run_files import RunFiles
from megatron_urlvr.train import Trainer
from megatron_urlvr.train import main as train
from megatron_urlvr.types import Group, Sampling

TOLERANCE = 1e-4
SMALL = ["rollout.prompts=4", "rollout.n_votes=8", "data.train.size=64", "eval.every=0", "monitor.tensorboard=false"]


def config_for(served: Served, work: Path, *overrides: str) -> Config:
    """The quickstart against the server that runs."""
    urls = f"servers.pools.policy.urls=[{served.wait()['url']}]"
    settings = [f"model.path={served.folder}", f"run.dir={work / 'run'}", urls, *overrides]
    return load_config(ROOT / "configs" / "quickstart_sglang.yaml", settings)


def trainer_for(config: Config) -> Iterator[Trainer]:
    layout = start(config.parallel, device=config.run.device, seed=config.run.seed)
    parts = build(config, layout)
    try:
        with RunFiles.opened(config, layout) as files:
            yield Trainer(config, parts, files, Interrupts(announce=False))
    finally:
        parts.close()


def difference(trainer: Trainer, groups: list[Group]) -> float:
    """Largest difference between the server's log-probs and the policy's own of the same tokens."""
    samples = [(group.prompt, sample) for group in groups for sample in group]
    rows = [Row(prompt.tokens, sample.tokens) for prompt, sample in samples]
    own = trainer.parts.policy.score(rows, {"logp"})
    worst = 0.0
    for (_, sample), stats in zip(samples, own, strict=True):
        assert sample.logp is not None
        worst = max(worst, float((stats.get("logp") - sample.logp).abs().max()))
    return worst


@pytest.mark.parametrize("transport", ["group", "disk"])
def test_log_probs_are_the_policys_before_and_after_three_steps(served: Served, tmp_path: Path, transport: str) -> None:
    config = config_for(served, tmp_path, *SMALL, f"servers.transport={transport}", "optim.lr=0.01")
    for trainer in trainer_for(config):
        parts = trainer.parts
        before = {name: tensor.clone() for name, tensor in parts.policy.export()}
        trainer.restore(trainer.files.begin(parts.fingerprints(), parts.policy))
        trainer.push_weights()
        sampling = Sampling(8, 16)
        assert difference(trainer, parts.generate(parts.train.prompts[:4], sampling)) < TOLERANCE
        for step in (1, 2, 3):
            metrics = trainer.take_step(step)
            assert metrics["rollout/faults"] == 0
            assert metrics["sync/servers"] == 1
        moved = max(float((tensor - before[name]).abs().max()) for name, tensor in parts.policy.export())
        assert moved > 1e-3, "three steps must have moved the weights for the comparison to mean anything"
        assert difference(trainer, parts.generate(parts.train.prompts[:4], sampling)) < TOLERANCE


def test_the_quickstart_trains_on_the_announced_server(served: Served, tmp_path: Path) -> None:
    overrides = [f"model.path={served.folder}", f"run.dir={tmp_path / 'run'}", "eval.sets.held_out.size=16"]
    config = load_config(ROOT / "configs" / "quickstart_sglang.yaml", overrides)
    served.wait()
    (tmp_path / "run" / "servers").parent.mkdir(parents=True)
    (tmp_path / "run" / "servers").symlink_to(served.servers)
    assert train(config) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(11))
    assert all(row["rollout/faults"] == 0 for row in rows[1:])
    assert all("eval/held_out/avg@4" in row for row in (rows[0], rows[5], rows[10]))


def test_a_server_killed_in_mid_rollout_comes_back_fenced_and_the_step_completes(
    served: Served, tmp_path: Path
) -> None:
    first = served.wait()
    overrides = [f"model.path={served.folder}", f"run.dir={tmp_path / 'run'}", *SMALL]
    overrides += ["rollout.n_votes=64", "rollout.prompts=16", "servers.pools.policy.concurrency=8"]
    config = load_config(ROOT / "configs" / "quickstart_sglang.yaml", overrides)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "servers").symlink_to(served.servers)
    for trainer in trainer_for(config):
        parts = trainer.parts
        assert parts.engine is not None
        hand_over(parts.policy.export(), parts.engine, parts.layout, version=7)
        pool: Any = parts.engine
        killed = threading.Event()
        found: list[Group] = []
        prompts = parts.train.prompts[:16]
        for group in parts.engine.generate(prompts, Sampling(64, 16)):
            found.append(group)
            if not killed.is_set():
                killed.set()
                os.kill(first["pid"], signal.SIGKILL)
        assert killed.is_set()
        second = served.wait(other_than=first["started"])
        assert second["pid"] != first["pid"]
        assert sorted(group.prompt.id for group in found) == sorted(prompt.id for prompt in prompts)
        for group in found:
            assert [sample.index for sample in group] == list(range(64))
            assert {sample.version for sample in group} == {7}
        assert difference(trainer, found) < TOLERANCE, "the server that came back samples from the policy's weights"
        metrics = pool.metrics()
        assert metrics["rollout/faults/connection"] > 0
        # At the next update it is a member of a new group.
        hand_over(parts.policy.export(), parts.engine, parts.layout, version=8)
        assert difference(trainer, list(parts.engine.generate(prompts[:2], Sampling(4, 16)))) < TOLERANCE
        assert torch.isfinite(torch.tensor(list(pool.metrics().values()))).all()
