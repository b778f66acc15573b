"""Recorded rollouts train a policy to where sampling took it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from small_runs import Command, at_step, rows, send, weights

from megatron_urlvr.rollout.records import read_records

QUIET = ("eval.every=0", "run.steps=3", "checkpoint.every=0")


def recorded(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "rollouts").iterdir()}


@pytest.fixture
def sampled(urlvr: Command, config: Path, tmp_path: Path) -> Path:
    """A run of three steps that recorded what it sampled."""
    assert urlvr("train", config, *QUIET, f"run.dir={tmp_path}/sampled", "rollout.record=true").code == 0
    return tmp_path / "sampled"


def test_a_replay_takes_the_same_steps_as_the_run_that_sampled(urlvr, config, tmp_path, sampled, monkeypatch):
    from megatron_urlvr.rollout.embedded import EmbeddedEngine

    monkeypatch.setattr(
        EmbeddedEngine, "__init__", lambda *a, **k: pytest.fail("a replay needs nothing to sample with")
    )
    outcome = urlvr("train", config, *QUIET, "rollout.engine=replay", f"rollout.replay_from={sampled}")
    assert outcome.code == 0
    assert rows(tmp_path / "run") == rows(sampled)
    taken, expected = weights(tmp_path / "run", 3), weights(sampled, 3)
    assert taken.keys() == expected.keys()
    for name in taken:  # building a model to sample from draws random numbers, which nothing else does
        assert taken[name] == expected[name] or name.startswith("rng")


def test_a_replay_grades_and_rewards_anew(urlvr, config, tmp_path, sampled):
    replay = ["rollout.engine=replay", f"rollout.replay_from={sampled}"]
    assert urlvr("train", config, *QUIET, *replay, "reward.terms.main.name=majority_vote").code == 0
    for replayed, original in zip(rows(tmp_path / "run"), rows(sampled), strict=True):
        for name in ("response/length", "vote/majority_ratio", "audit/accuracy"):
            assert replayed.get(name) == original.get(name)
        if "reward/proxy" in replayed:
            assert 0 < replayed["reward/proxy"] <= 1


def test_recording_alone_leaves_the_policy_as_it_is(urlvr, config, tmp_path, sampled):
    only = tmp_path / "only"
    assert urlvr("train", config, *QUIET, f"run.dir={only}", "run.rollout_only=true").code == 0
    assert len(recorded(only)) == 3
    assert recorded(only)["step_000001.jsonl.zst"] == recorded(sampled)["step_000001.jsonl.zst"]
    assert not any(name.startswith(("train/", "loss/")) for row in rows(only) for name in row)
    versions = {
        sample["version"]
        for path in (only / "rollouts").iterdir()
        for group in read_records(path)
        for sample in group["samples"]
    }
    assert versions == {0}
    replay = ["rollout.engine=replay", f"rollout.replay_from={only}"]
    assert urlvr("train", config, *QUIET, *replay).code == 0
    assert rows(tmp_path / "run")[:2] == rows(sampled)[:2]


def test_a_recording_that_was_broken_off_goes_on_where_it_was(urlvr, config, tmp_path, monkeypatch):
    only = ["run.rollout_only=true", *QUIET]
    assert urlvr("train", config, *only, f"run.dir={tmp_path}/whole").code == 0
    with at_step(monkeypatch, 2, send(signal.SIGTERM)):
        assert urlvr("train", config, *only).code == 75
    outcome = urlvr("train", config, *only)
    assert (outcome.code, "resumed after step 1" in outcome.out) == (0, True)
    assert recorded(tmp_path / "run") == recorded(tmp_path / "whole")
    assert "is done: 3 steps" in urlvr("train", config, *only).out


def test_a_replay_that_runs_out_or_does_not_fit_says_so(urlvr, config, tmp_path, sampled):
    replay = ["rollout.engine=replay", f"rollout.replay_from={sampled}", "eval.every=0", "checkpoint.every=0"]

    def says(*overrides: str) -> str:
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        outcome = urlvr("train", config, *replay, f"run.dir={run}", *overrides)
        assert outcome.code == 2
        return outcome.err

    assert "step_000004.jsonl.zst was not recorded; lower run.steps" in says("run.steps=4")
    assert "rollout.n_votes = 8, but step 1" in says("rollout.n_votes=8")
    assert "replay needs the recording run's data" in says("run.seed=2")
    assert urlvr("train", config, *replay, "run.steps=3", "rollout.n_votes=2").code == 0
