"""Training against real servers: the weights they sample from are the policy's, step after step, whatever happens."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REWARDS
from supervised import ROOT, Served

from megatron_urlvr.config.loader import load_config
from megatron_urlvr.config.root import Config
from megatron_urlvr.distributed.exchange import hand_over
from megatron_urlvr.distributed.layout import start
from megatron_urlvr.loop.assembly import build
from megatron_urlvr.policy.batch import Row
from megatron_urlvr.run.files import RunFiles
from megatron_urlvr.run.interrupts import Interrupts
from megatron_urlvr.train import Trainer
from megatron_urlvr.train import main as train
from megatron_urlvr.types import Group, Sampling

TOLERANCE = 1e-4
QUICKSTART = ROOT / "configs" / "quickstart_sglang.yaml"
SMALL = ["rollout.prompts=4", "rollout.n_votes=8", "data.train.size=64", "eval.every=0", "monitor.tensorboard=false"]


def config_for(served: Served, work: Path, *overrides: str) -> Config:
    """The quickstart against one of the servers that run."""
    urls = f"servers.pools.policy.urls=[{served.wait()['url']}]"
    settings = [f"model.path={served.folder}", f"run.dir={work / 'run'}", urls, *overrides]
    return load_config(QUICKSTART, settings)


def config_for_all(served: Served, work: Path, *overrides: str) -> Config:
    """The quickstart with the servers that are announced, as they come and go."""
    (work / "run").mkdir()
    (work / "run" / "servers").symlink_to(served.servers)
    return load_config(QUICKSTART, [f"model.path={served.folder}", f"run.dir={work / 'run'}", *overrides])


def trainer_for(config: Config) -> Iterator[Trainer]:
    layout = start(config.parallel, device=config.run.device, seed=config.run.seed)
    parts = build(config, layout)
    try:
        with RunFiles.opened(config, layout) as files:
            trainer = Trainer(config, parts, files, Interrupts(announce=False))
            trainer.restore(files.begin(parts.fingerprints(), parts.policy))
            trainer.push_weights()
            yield trainer
    finally:
        parts.close()


def differences(trainer: Trainer, groups: list[Group], *names: str) -> dict[str, float]:
    """Largest differences between what the servers say of their tokens and what the policy says of the same ones."""
    samples = [(group.prompt, sample) for group in groups for sample in group]
    rows = [Row(prompt.tokens, sample.tokens) for prompt, sample in samples]
    own = trainer.parts.policy.score(rows, frozenset({"logp", *names}))
    worst = dict.fromkeys(("logp", *names), 0.0)
    for (_, sample), stats in zip(samples, own, strict=True):
        assert sample.logp is not None
        worst["logp"] = max(worst["logp"], float((stats.get("logp") - sample.logp).abs().max()))
        for name in names:
            assert sample.stats is not None
            worst[name] = max(worst[name], float((stats.get(name) - sample.stats.get(name)).abs().max()))
    return worst


WAYS = {
    "group": [],
    "disk": ["servers.transport=disk"],
    "in turns": ["servers.transport=disk", "servers.colocated=true"],
}


def served_step(trainer: Trainer, step: int) -> dict[str, float]:
    """A step with the weights that it left handed over."""
    metrics = trainer.take_step(step)
    trainer.push_weights()
    return metrics | trainer.parts.engine_metrics({})


@pytest.mark.parametrize("way", WAYS)
def test_log_probs_are_the_policys_before_and_after_three_steps(served: Served, tmp_path: Path, way: str) -> None:
    config = config_for(served, tmp_path, *SMALL, *WAYS[way], "servers.verify=true", "optim.lr=0.01")
    for trainer in trainer_for(config):
        parts = trainer.parts
        assert ("sync/seconds_sleep" in parts.engine_metrics({})) == config.servers.colocated
        before = {name: tensor.clone() for name, tensor in parts.policy.export()}
        prompts, sampling = parts.train.prompts[:4], Sampling(8, 16)
        assert differences(trainer, parts.generate(prompts, sampling))["logp"] < TOLERANCE
        for step in (1, 2, 3):
            metrics = served_step(trainer, step)
            assert metrics["rollout/faults"] == 0
            assert metrics["sync/servers"] == metrics["sync/verified"] == 1
            assert metrics["mismatch/logp_max_diff"] < TOLERANCE
            held = [each.grad_data.untyped_storage().nbytes() for each in parts.policy.trained[0].buffers]
            assert any(held) != config.servers.colocated, "who generates in turns has the gradients' memory"
        moved = max(float((tensor - before[name]).abs().max()) for name, tensor in parts.policy.export())
        assert moved > 1e-3, "three steps must have moved the weights for the comparison to mean anything"
        assert differences(trainer, parts.generate(prompts, sampling))["logp"] < TOLERANCE


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics_of_the_plug_in_are_the_policys_and_save_the_scoring_pass(
    served: Served, tmp_path: Path, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(served, tmp_path, *SMALL, *REWARDS, f"rollout.temperature={temperature}", "optim.lr=0.01")
    for trainer in trainer_for(config):
        scored: list[int] = []
        score = trainer.parts.policy.score

        def counted(rows: Any, *arguments: Any, **options: Any) -> Any:
            scored.append(len(rows))  # noqa: B023
            return score(rows, *arguments, **options)  # noqa: B023

        monkeypatch.setattr(trainer.parts.policy, "score", counted)
        for step in (1, 2):
            metrics = served_step(trainer, step)
            assert metrics["rollout/stats_max_diff"] < TOLERANCE
            assert metrics["rollout/stats_alarm"] == 0
            assert metrics["mismatch/reward_max_diff"] < TOLERANCE
        assert scored == [8, 8], "only the group that is compared is scored, each step"
        worst = differences(trainer, trainer.groups, "entropy", "self_certainty")
        assert min(worst.values()) > TOLERANCE, "the last step has moved the weights"
        trainer.push_weights()
        groups = trainer.parts.generate(trainer.parts.train.prompts[:4], Sampling(8, 16, temperature))
        worst = differences(trainer, groups, "entropy", "self_certainty")
        assert max(worst.values()) < TOLERANCE


AUDITED = ("audit/accuracy", "audit/vote/reward_accuracy", "audit/vote/label_accuracy", "audit/top_sample_accuracy")
OF_POLICY = ("vote/majority_ratio", "response/length", "policy/sampled_entropy", "reward/proxy")


def test_ten_steps_of_the_quickstart_are_those_of_the_embedded_engine_but_for_noise(
    served: Served, tmp_path: Path
) -> None:
    served.wait_for(2)
    sizes = ["eval.sets.held_out.size=16", "monitor.tensorboard=false"]
    assert train(config_for_all(served, tmp_path, *sizes)) == 0
    embedded = [f"model.path={served.folder}", f"run.dir={tmp_path / 'embedded'}", "rollout.engine=embedded", *sizes]
    assert train(load_config(QUICKSTART, embedded)) == 0
    theirs, ours = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "embedded")
    )
    assert [row["step"] for row in theirs] == list(range(11))
    faults = [{k: v for k, v in row.items() if k.startswith("rollout/faults") and v} for row in theirs[1:]]
    assert not any(faults), faults
    assert all("eval/held_out/avg@4" in row for row in (theirs[0], theirs[5], theirs[10]))
    for name in (*AUDITED, *OF_POLICY):
        # The same prompts at every step: their difficulty cancels in the difference. With 9 degrees of freedom, 8
        # standard errors are passed by chance once in 45,000 times.
        gaps = [a[name] - b[name] for a, b in zip(theirs[1:], ours[1:], strict=True)]
        noise = statistics.stdev(gaps) / math.sqrt(len(gaps))
        assert abs(statistics.mean(gaps)) < 8 * noise + 1e-6, f"{name}: {gaps}"


def test_of_two_servers_one_is_killed_in_mid_rollout_and_comes_back(served: Served, tmp_path: Path) -> None:
    first, _ = served.wait_for(2)
    sizes = [*SMALL, "rollout.n_votes=64", "rollout.prompts=16", "servers.pools.policy.concurrency=8"]
    for trainer in trainer_for(config_for_all(served, tmp_path, *sizes)):
        parts = trainer.parts
        engine: Any = parts.engine
        good, answers = engine.pool.good, []

        def kill_after_some(server: Any) -> None:
            good(server)  # noqa: B023
            answers.append(server)  # noqa: B023
            if len(answers) == 100:  # noqa: B023
                os.kill(first["pid"], signal.SIGKILL)

        engine.pool.good = kill_after_some
        metrics = served_step(trainer, 1)
        engine.pool.good = good
        assert metrics["rollout/faults/connection"] > 0
        assert math.isfinite(metrics["train/loss"])
        assert len({group.prompt.id for group in trainer.groups}) == 16
        for group in trainer.groups:
            assert [sample.index for sample in group] == list(range(64)), "each sample once"
        served.wait_until_replaced(first)
        # It holds the weights it was started with, and gets nothing to do until it has read the newest.
        assert parts.engine is not None
        groups = list(parts.engine.generate(parts.train.prompts[:16], Sampling(32, 16)))
        assert differences(trainer, groups)["logp"] < TOLERANCE
        assert {sample.version for group in groups for sample in group} == {trainer.version}
        # At the next update both are members of a new group.
        hand_over(parts.policy, parts.engine, parts.layout, version=trainer.version + 1)
        assert engine.metrics()["sync/servers"] == 2
        assert (
            differences(trainer, list(parts.engine.generate(parts.train.prompts[:4], Sampling(8, 16))))["logp"]
            < TOLERANCE
        )
        assert all(server.up for server in engine.health())
