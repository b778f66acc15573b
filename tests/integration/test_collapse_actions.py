"""What a run does when the detector raises its alarm, and that being watched leaves it resumable to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import Command, assert_same_run, checkpoints, rows, status, weights

EAGER = (
    "monitor.collapse.baseline_steps=2",
    "monitor.collapse.window=1",
    "monitor.collapse.patience=2",
    "monitor.collapse.snapshot_every=1",
    "monitor.collapse.snapshots=12",
)
"""The alarm is raised at step 5 when responses degenerate from step 4 on."""


@pytest.fixture
def degenerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """From step 4 on the detector is told that most responses were cut off."""
    from megatron_urlvr.monitor import collapse

    original = collapse.CollapseDetector.observe

    def observe(self: Any, step: int, metrics: Any) -> Any:
        return original(self, step, {**metrics, **_FINE, "response/truncated": 1.0 if step >= 4 else 0.0})

    monkeypatch.setattr(collapse.CollapseDetector, "observe", observe)


_FINE = {
    "answers/across_prompts": 0.1,
    "response/no_answer": 0.0,
    "response/repetition": 0.0,
    "response/length": 8.0,
    "kl/start": 0.0,
}


@pytest.mark.usefixtures("degenerate")
def test_a_warning_is_told_once_and_the_run_goes_on(urlvr: Command, config: Path, tmp_path: Path) -> None:
    outcome = urlvr("train", config, *EAGER)
    assert outcome.code == 0
    assert outcome.err.count("warning: collapse since step 4 (seen at step 5): the share of responses cut off is 1.00")
    assert outcome.err.count("warning") == 1
    assert [row.get("collapse/alarm") for row in rows(tmp_path / "run")] == [None, 0, 0, 0, 0, 1, 1]
    assert not (tmp_path / "run/snapshots").exists()


@pytest.mark.usefixtures("degenerate")
def test_a_stopped_run_says_why_and_goes_on_only_when_told_to(urlvr: Command, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = urlvr("train", config, *EAGER, "monitor.collapse.action=stop")
    assert outcome.code == 3
    assert (status(run)["state"], status(run)["step"], status(run)["exit_code"]) == ("stopped", 5, 3)
    assert status(run)["reason"].startswith("collapse since step 4 (seen at step 5): the share of responses cut off")
    assert checkpoints(run)[-1] == "step_000005"

    again = urlvr("train", config, *EAGER, "monitor.collapse.action=stop")
    assert (again.code, status(run)["step"]) == (3, 5)
    assert "was stopped" in again.out
    assert urlvr("train", config, *EAGER).code == 0
    assert status(run)["state"] == "done"


@pytest.mark.usefixtures("degenerate")
def test_a_roll_back_leaves_the_weights_from_before_the_collapse(urlvr: Command, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert urlvr("train", config, "run.steps=2").code == 0
    before = weights(run, 2)
    (tmp_path / "run").rename(tmp_path / "short")

    outcome = urlvr("train", config, *EAGER, "monitor.collapse.action=rollback")
    assert outcome.code == 3
    assert status(run)["reason"].endswith("; rolled back to step 2")
    assert status(run)["step"] == 2
    # what was written after it is set aside, and evaluation and resuming find the healthy weights
    assert {"step_000002", "collapsed_step_000004"} <= set(checkpoints(run))
    after = weights(run, 2)
    assert {k: v for k, v in after.items() if k != "trainer.json"} == {
        k: v for k, v in before.items() if k != "trainer.json"
    }
    assert rows(run)[-1]["step"] == 5  # the story stays told


def test_a_watched_run_in_two_parts_is_the_run_in_one(urlvr: Command, config: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", (*EAGER, "monitor.collapse.action=rollback", "monitor.collapse.patience=6")
    settings = (*settings, "monitor.collapse.snapshots=16")
    assert urlvr("train", config, *settings).code == 0
    assert sorted(path.name for path in (run / "snapshots").iterdir())[0] == "step_000000"
    run.rename(tmp_path / "whole")
    assert urlvr("train", config, *settings, "run.steps=3").code == 0
    assert urlvr("train", config, *settings).code == 0
    assert_same_run(run, tmp_path / "whole", step=6)
    trainer = json.loads((run / "checkpoints/step_000006/trainer.json").read_text())
    assert set(trainer["watch"]["majorities"])  # met prompts are remembered
    assert "answers/across_prompts" in rows(run)[-1]
