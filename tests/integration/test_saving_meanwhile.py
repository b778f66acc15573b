"""`checkpoint.background`: a run is the same run, whatever happens while a checkpoint is being written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import Command, assert_same_run, at_step, checkpoints, rows, send, status

from megatron_urlvr.policy import writing
from megatron_urlvr.train import Trainer

KILLED_WHILE_WRITING = """
import os, signal, sys, threading
from megatron_urlvr import cli, train
from megatron_urlvr.policy import writing

reached, saved, write, observe = threading.Event(), [], writing._write_item, train.Trainer.observe
def held(transforms, stream, data, item, key, form):
    result = write(transforms, stream, data, item, key, form)
    if "step_000004" in stream.name:
        stream.flush()
        reached.set()
        threading.Event().wait()
    return result
def killed(self, groups, results, step):
    if step == 6:
        assert reached.wait(60)
        os.kill(os.getpid(), signal.SIGKILL)
    return observe(self, groups, results, step)
writing._write_item, train.Trainer.observe = held, killed
sys.argv = ["urlvr", *sys.argv[1:]]
cli.main()
"""
BACKGROUND = "checkpoint.background=true"


def test_a_run_that_saves_in_the_background_is_the_run_that_waits(urlvr: Command, config: Path, whole: Path, tmp_path):
    outcome = urlvr("train", config, BACKGROUND)
    assert outcome.code == 0
    assert checkpoints(tmp_path / "run") == checkpoints(whole)
    assert_same_run(tmp_path / "run", whole, step=6)
    assert_same_run(tmp_path / "run", whole, step=4 if "step_000004" in checkpoints(whole) else 6)


def test_a_process_killed_while_it_writes_goes_on_from_the_checkpoint_before(urlvr, config, whole, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, "train", str(config), BACKGROUND]
    process = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (status(run)["state"], rows(run)[-1]["step"]) == ("running", 5)
    assert checkpoints(run) == [".step_000004.writing", "step_000002"]

    outcome = urlvr("train", config, BACKGROUND)
    assert outcome.code == 0
    assert "resumed after step 2" in outcome.out
    assert checkpoints(run) == ["step_000004", "step_000006"]
    assert_same_run(run, whole, step=6)


@pytest.fixture
def slow_writer(monkeypatch):
    """Files are written no sooner than somebody waits for them."""
    import threading

    waited, write, wait = threading.Event(), writing._write_item, writing.Part.wait

    def held(*arguments):
        assert waited.wait(60)
        return write(*arguments)

    def waits(self):
        waited.set()
        return wait(self)

    monkeypatch.setattr(writing, "_write_item", held)
    monkeypatch.setattr(writing.Part, "wait", waits)


def test_a_signal_waits_for_what_is_being_written(urlvr, config, whole, tmp_path, monkeypatch, slow_writer):
    run = tmp_path / "run"
    with at_step(monkeypatch, 4, send(signal.SIGTERM)):
        outcome = urlvr("train", config, BACKGROUND)
    assert outcome.code == 75
    assert "saved after step 3" in outcome.err
    assert checkpoints(run) == ["step_000002", "step_000003"]
    assert urlvr("train", config, BACKGROUND).code == 0
    assert_same_run(run, whole, step=6)


def test_a_disk_that_is_full_is_told_as_if_the_run_had_waited(urlvr, config, whole, tmp_path, monkeypatch):
    run, write = tmp_path / "run", writing._write_item

    def full(transforms, stream, *rest):
        if "step_000004" in stream.name:
            raise OSError(28, os.strerror(28))
        return write(transforms, stream, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_write_item", full)
        outcome = urlvr("train", config, BACKGROUND)
    assert outcome.code == 1
    assert f"failed: could not write checkpoint {run}/checkpoints/step_000004: [Errno 28] No space left" in outcome.err
    assert "Traceback" not in outcome.err
    assert (status(run)["state"], checkpoints(run)) == ("failed", ["step_000002"])
    assert urlvr("train", config, BACKGROUND).code == 0
    assert_same_run(run, whole, step=6)


def test_a_run_that_nobody_foresaw_the_end_of_leaves_at_once(urlvr, config, tmp_path, monkeypatch):
    seen = []
    abandon = writing.Part.stop
    monkeypatch.setattr(writing.Part, "stop", lambda self: (seen.append(self), abandon(self)))

    def bug(self, *arguments):
        if self.step == 2:
            raise ZeroDivisionError
        return original(self, *arguments)

    original = Trainer.observe
    monkeypatch.setattr(Trainer, "observe", bug)
    monkeypatch.setattr("megatron_urlvr.policy.checkpoint.Saving.written", lambda self: False)
    with pytest.raises(ZeroDivisionError):
        urlvr("train", config, BACKGROUND)
    assert len(seen) == 1
    assert not seen[0].busy
    assert checkpoints(tmp_path / "run") == [".step_000002.writing"]
