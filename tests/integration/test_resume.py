"""A run that is broken off and continued is the run that was not, to the last bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import Command, assert_same_run, at_step, checkpoints, rows, send, status

from megatron_urlvr.rewards.cross_vote import Votes

IN_THE_MIDDLE = """
import os, signal, sys
from megatron_urlvr import cli, train

original, wanted = train.Trainer.observe, int(sys.argv[1])
def observe(self, groups, results, step):
    if step == wanted:
        {act}
    return original(self, groups, results, step)
train.Trainer.observe = observe
sys.argv = ["urlvr", *sys.argv[2:]]
cli.main()
"""


def start(act: str, step: int, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own that does `act` in the middle of `step`."""
    command = [sys.executable, "-c", IN_THE_MIDDLE.format(act=act), str(step), *map(str, arguments)]
    pipe = subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def test_a_run_in_two_parts_is_the_run_in_one(urlvr: Command, config: Path, whole: Path, tmp_path: Path) -> None:
    assert urlvr("train", config, "run.steps=3").code == 0
    assert (tmp_path / "run/DONE").exists()
    outcome = urlvr("train", config)
    assert outcome.code == 0
    assert f"resumed after step 3 from {tmp_path}/run/checkpoints/step_000003 (0 later rows" in outcome.out
    assert_same_run(tmp_path / "run", whole, step=6)
    assert checkpoints(tmp_path / "run") == ["step_000004", "step_000006"]


def test_offline_votes_are_not_taken_again_by_the_second_part(urlvr, config, monkeypatch):
    asked = []
    original = Votes._winners
    monkeypatch.setattr(Votes, "_winners", lambda self, new, batch: asked.extend(new) or original(self, new, batch))
    votes = {
        "name": "votes",
        "of": "prompt",
        "weights": "reference",
        "samples": 2,
        "max_new_tokens": 12,
        "offline": True,
    }
    few = ["data.train.size=4", "eval.every=0", 'reward.terms.main={"name": "co_rewarding"}']
    few.append(f"reward.providers.votes={json.dumps(votes)}")
    assert urlvr("train", config, "run.steps=1", *few).code == 0
    assert len(asked) == 4
    assert urlvr("train", config, "run.steps=2", *few).code == 0
    assert len(asked) == 4


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 4), (signal.SIGINT, 6)])
def test_a_signal_in_a_step_leaves_the_step_before_it(urlvr, config, whole, tmp_path, monkeypatch, number, step):
    run = tmp_path / "run"
    with at_step(monkeypatch, step, send(number)):
        outcome = urlvr("train", config, "checkpoint.every=0")
    assert outcome.code == 75
    assert (status(run)["state"], status(run)["step"], status(run)["exit_code"]) == ("preempted", step - 1, 75)
    assert f"preempted: {signal.Signals(number).name}; saved after step {step - 1}" in outcome.err
    assert checkpoints(run) == [f"step_{step - 1:06d}"]
    assert not (run / "DONE").exists()

    assert urlvr("train", config, "checkpoint.every=0").code == 0
    assert status(run)["state"] == "done"
    assert_same_run(run, whole, step=6)


def test_a_signal_before_step_0_is_complete_leaves_nothing_to_resume(urlvr, config, whole, tmp_path, monkeypatch):
    from megatron_urlvr import train

    original = train.build
    with monkeypatch.context() as patch:
        patch.setattr(train, "build", lambda *a, **k: (send(signal.SIGTERM)(), original(*a, **k))[1])
        outcome = urlvr("train", config)
    assert (outcome.code, checkpoints(tmp_path / "run")) == (75, [])
    assert "SIGTERM before step 0 was complete; the same command starts again" in outcome.err
    assert urlvr("train", config).code == 0
    assert_same_run(tmp_path / "run", whole, step=6)


def test_a_second_ctrl_c_does_not_wait(urlvr, config, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with at_step(monkeypatch, 4, lambda: (send(signal.SIGINT)(), send(signal.SIGINT)())):
        outcome = urlvr("train", config)
    assert outcome.code == 75
    assert "interrupted again, so nothing was saved" in outcome.err
    assert (status(run)["state"], checkpoints(run)) == ("preempted", ["step_000002"])
    assert urlvr("train", config).code == 0
    assert_same_run(run, whole, step=6)


def test_a_process_that_is_killed_goes_on_from_its_last_checkpoint(urlvr, config, whole, tmp_path):
    run = tmp_path / "run"
    process = start("os.kill(os.getpid(), signal.SIGKILL)", 6, "train", config, "checkpoint.every=4")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (status(run)["state"], rows(run)[-1]["step"], checkpoints(run)) == ("running", 5, ["step_000004"])

    outcome = urlvr("train", config, "checkpoint.every=4")
    assert outcome.code == 0
    assert "resumed after step 4" in outcome.out
    assert "(1 later rows of metrics dropped)" in outcome.out
    assert_same_run(run, whole, step=6)


def test_a_folder_in_use_is_refused_and_its_run_goes_on_to_be_preempted(urlvr, config, whole, tmp_path):
    run = tmp_path / "run"
    process = start("print('here', flush=True); sys.stdin.readline()", 3, "train", config)
    assert process.stdout is not None
    assert any(line == "here\n" for line in process.stdout)

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = urlvr("train", config)
    assert refused.code == 2
    assert f"{run} is in use by process {process.pid} on " in refused.err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    process.send_signal(signal.SIGTERM)
    _, err = process.communicate("\n")
    assert process.returncode == 75, err
    assert "SIGTERM: giving up the step in progress, saving the last completed one\n" in err
    assert "Traceback" not in err
    assert status(run)["step"] == 2
    assert urlvr("train", config).code == 0
    assert_same_run(run, whole, step=6)


def test_moving_averages_mini_batches_and_epochs_of_the_data_resume_too(urlvr, config, tmp_path, monkeypatch):
    settings = [
        "data.train.size=10",
        "eval.every=2",
        "optim.ema_decay=0.8",
        "optim.schedule=cosine",
        "optim.weight_decay=0.1",
        "algorithm.kl.coef=0.1",
        "algorithm.kl.reference=ema",
        "algorithm.mini_batch=2",
        "algorithm.epochs=2",
    ]
    assert urlvr("train", config, f"run.dir={tmp_path}/one", *settings).code == 0
    with at_step(monkeypatch, 4, send(signal.SIGTERM)):
        assert urlvr("train", config, f"run.dir={tmp_path}/two", *settings).code == 75
    assert urlvr("train", config, f"run.dir={tmp_path}/two", *settings).code == 0
    assert_same_run(tmp_path / "one", tmp_path / "two", step=6)


# -- what may not be continued ----------------------------------------------------------------------------------------


@pytest.fixture
def run_of_two(urlvr: Command, config: Path, tmp_path: Path) -> Path:
    assert urlvr("train", config, "run.steps=2").code == 0
    return tmp_path / "run"


def test_a_changed_setting_is_refused_by_name_and_nothing_is_lost(urlvr, config, run_of_two):
    before = {path: path.read_bytes() for path in run_of_two.rglob("*") if path.is_file() and path.name != ".lock"}
    outcome = urlvr(
        "train", config, "optim.lr=0.5", "reward.terms.main.name=random", "parallel.distributed_optimizer=false"
    )
    assert outcome.code == 2
    assert "parallel.distributed_optimizer: True -> False" in outcome.err
    assert "optim.lr: 0.001 -> 0.5" in outcome.err
    assert "reward.terms.main.name: trajectory_entropy -> random" in outcome.err
    assert before == {path: path.read_bytes() for path in before}


def test_raising_the_steps_of_a_falling_rate_needs_the_horizon_it_began_with(urlvr, config, tmp_path):
    falling = ["optim.schedule=linear", "optim.min_lr=1.0e-4", "eval.every=0"]
    assert urlvr("train", config, *falling, "run.steps=2").code == 0
    outcome = urlvr("train", config, *falling, "run.steps=3")
    assert outcome.code == 2
    assert "optim.schedule_steps: 2 -> 3" in outcome.err
    assert "began with a horizon of 2 steps: optim.schedule_steps=2 keeps it, and steps after it are taken at" in (
        outcome.err
    )
    assert urlvr("train", config, *falling, "run.steps=3", "optim.schedule_steps=2").code == 0
    assert [row.get("train/lr") for row in rows(tmp_path / "run")] == [None, 1e-3, pytest.approx(5.5e-4), 1e-4]


def test_a_base_that_is_no_longer_what_it_was_is_refused(urlvr, config, run_of_two, base, tmp_path):
    import shutil

    shutil.copytree(base, tmp_path / "base", dirs_exist_ok=True)
    assert urlvr("train", config, f"run.dir={tmp_path}/moved", f"model.path={tmp_path}/base", "run.steps=1").code == 0
    with (tmp_path / "base/model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    outcome = urlvr("train", config, f"run.dir={tmp_path}/moved", f"model.path={tmp_path}/base", "run.steps=2")
    assert outcome.code == 2
    assert "began with other contents of model, under the same settings" in outcome.err


def test_resume_never_refuses_a_folder_that_holds_a_run(urlvr, config, run_of_two):
    outcome = urlvr("train", config, "run.resume=never", "run.steps=2")
    assert outcome.code == 2
    assert f"run.resume = never, but run.dir = {run_of_two} holds a run already" in outcome.err


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_is_done_is_left_as_it_is(urlvr, config, run_of_two, steps):
    before = {path: path.read_bytes() for path in run_of_two.rglob("*") if path.is_file() and path.name != ".lock"}
    outcome = urlvr("train", config, f"run.steps={steps}")
    assert outcome.code == 0
    assert outcome.out == f"{run_of_two} is done: 2 steps; raise run.steps to go on\n"
    assert before == {path: path.read_bytes() for path in before}


def test_a_folder_with_metrics_of_an_unknown_run_is_refused(urlvr, config, run_of_two):
    (run_of_two / "config.yaml").unlink()
    outcome = urlvr("train", config)
    assert outcome.code == 2
    assert "holds metrics or checkpoints, but no config.yaml" in outcome.err
