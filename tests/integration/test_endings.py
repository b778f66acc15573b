"""How runs end that cannot go on: what they say, what they keep, and that they can be continued."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from full_disk import NO_LIMIT, files_of_at_most
from safetensors.torch import load_file, save_file
from small_runs import Command, assert_same_run, checkpoints, rows, status

from megatron_urlvr import train
from megatron_urlvr.loop import batching
from megatron_urlvr.policy import checkpoint
from megatron_urlvr.policy.integrity import FORMAT, sha256, verify
from megatron_urlvr.rollout.embedded import EmbeddedEngine
from megatron_urlvr.rollout.faults import Abandoned, RolloutFailed
from megatron_urlvr.rollout.records import group_from_record, read_records
from megatron_urlvr.run import files as run_files

# -- a loss that is not finite ----------------------------------------------------------------------------------------


@pytest.fixture
def nan_advantages(monkeypatch):
    """`with nan_advantages(update)`: the advantages of the run's `update`-th update (from 1) are NaN."""

    @contextmanager
    def poisoned(update: int) -> Iterator[None]:
        seen = []
        original = batching.weigh

        def weigh(rows, *rest):
            seen.append(None)
            original(rows, *rest)
            if len(seen) == update:
                rows[0].advantage = math.nan

        with monkeypatch.context() as patch:
            patch.setattr(batching, "weigh", weigh)
            yield

    return poisoned


def test_a_loss_that_is_nan_leaves_the_weights_before_it_and_the_batch(
    urlvr: Command, config: Path, whole: Path, tmp_path: Path, nan_advantages
) -> None:
    run = tmp_path / "run"
    with nan_advantages(4):
        outcome = urlvr("train", config, "checkpoint.every=0")
    assert outcome.code == 4
    assert outcome.err.startswith("failed: step 4: the loss is nan; the weights before it are saved as")
    assert (status(run)["state"], status(run)["step"], status(run)["exit_code"]) == ("failed", 3, 4)
    assert rows(run)[-1]["step"] == 3
    assert checkpoints(run) == ["step_000003"]

    groups = [group_from_record(record) for record in read_records(run / "rollouts/step_000004.jsonl.zst")]
    assert [len(group) for group in groups] == [4] * 4
    assert "step 4, rollouts: 16 of 16 samples" in urlvr("samples", run, "--step", "4").out

    # The cause is gone (the patch is), and neither weights, moments nor places in the data have suffered.
    shutil.rmtree(run / "rollouts")
    assert urlvr("train", config, "checkpoint.every=0").code == 0
    assert_same_run(run, whole, step=6)


def test_the_kept_batch_is_replayed_in_its_place(urlvr, config, tmp_path, nan_advantages):
    run = tmp_path / "run"
    with nan_advantages(4):
        assert urlvr("train", config, "checkpoint.every=0").code == 4
    replay = ["rollout.engine=replay", f"rollout.replay_from={run}", "eval.every=0", "checkpoint.every=0"]
    with nan_advantages(1):  # what is wrong with this batch still is: its update is the first that is taken
        outcome = urlvr("train", config, *replay, "run.steps=4")
    assert outcome.code == 4
    assert "step 4: the loss is nan" in outcome.err
    assert (status(run)["step"], checkpoints(run)) == (3, ["step_000003"])
    outcome = urlvr("train", config, *replay, "run.steps=4")
    assert outcome.code == 0
    assert "resumed after step 3" in outcome.out
    sampled = {group["prompt"]["id"]: group for group in read_records(run / "rollouts/step_000004.jsonl.zst")}
    lengths = [len(sample["tokens"]) for group in sampled.values() for sample in group["samples"]]
    assert rows(run)[-1]["response/length"] == sum(lengths) / 16


def test_a_nan_after_the_first_of_several_updates_keeps_the_checkpoint_before(
    urlvr, config, tmp_path, monkeypatch, nan_advantages
):
    """Also one that was still being written: nothing newer can be saved."""
    monkeypatch.setattr(checkpoint.Saving, "written", lambda self: False)
    run = tmp_path / "run"
    with nan_advantages(6):
        outcome = urlvr("train", config, "algorithm.mini_batch=2", "checkpoint.background=true")
    assert outcome.code == 4
    assert "step 3: the loss is nan; its batch is kept in" in outcome.err
    assert checkpoints(run) == ["step_000002"]


def test_a_weight_that_is_not_a_number_is_met_in_the_reward(urlvr, config, base, tmp_path):
    poisoned = tmp_path / "poisoned"
    shutil.copytree(base, poisoned)
    tensors = load_file(poisoned / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, poisoned / "model.safetensors", metadata={"format": "pt"})
    outcome = urlvr("train", config, f"model.path={poisoned}", "eval.every=0")
    assert outcome.code == 4
    assert "failed: step 1: reward 'trajectory_entropy' (term 'main') is nan for sample 0 of prompt" in outcome.err
    assert len(list(read_records(tmp_path / "run/rollouts/step_000001.jsonl.zst"))) == 4
    outcome = urlvr("train", config, f"model.path={poisoned}", f"run.dir={tmp_path}/evaluated")
    assert outcome.code == 4  # already in the samples of step 0's evaluation
    assert status(tmp_path / "evaluated")["step"] == 0


# -- weights that do not arrive ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [
        (RolloutFailed("no rollout server for 9 s"), 5, "failed: no rollout server for 9 s; saved after step 4"),
        (Abandoned("a signal"), 75, "preempted: a signal on another rank; saved after step 4"),
    ],
)
def test_a_step_whose_weights_are_not_taken_counts_and_is_saved(
    urlvr, config, whole, tmp_path, monkeypatch, fault, code, told
):
    """The optimizer has stepped, and what failed is the engine's: steps and weights go on as if nothing had been."""
    run, settings = tmp_path / "run", ["checkpoint.background=true"]
    update = EmbeddedEngine.update

    def fails(self, weights):
        if self._pending == 4:
            next(iter(weights))
            raise fault
        update(self, weights)

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddedEngine, "update", fails)
        outcome = urlvr("train", config, *settings)
    assert outcome.code == code
    assert told in outcome.err
    assert (status(run)["step"], rows(run)[-1]) == (4, rows(whole)[4])
    assert checkpoints(run) == ["step_000002", "step_000004"]

    assert urlvr("train", config, *settings).code == 0
    assert_same_run(run, whole, step=6)


# -- checkpoints that are damaged -------------------------------------------------------------------------------------


@pytest.fixture
def run_of_four(urlvr: Command, config: Path, tmp_path: Path) -> Path:
    """Four steps, with checkpoints after 2 and 4."""
    assert urlvr("train", config, "run.steps=4", "eval.every=3").code == 0
    return tmp_path / "run"


def truncate(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 100)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(urlvr, config, whole, tmp_path, run_of_four):
    truncate(run_of_four / "checkpoints/step_000004")
    outcome = urlvr("train", config, "checkpoint.keep=1")
    assert outcome.code == 0
    assert "checkpoints/step_000004 is refused: __0_0.distcp holds" in outcome.err
    assert f"; continuing from {run_of_four}/checkpoints/step_000002" in outcome.err
    assert checkpoints(run_of_four) == ["damaged_step_000004", "step_000006"]
    assert_same_run(run_of_four, whole, step=6)


def test_a_damaged_checkpoint_makes_room_for_a_whole_one_of_its_step(urlvr, config, run_of_four):
    truncate(run_of_four / "checkpoints/step_000004")
    assert urlvr("train", config, "run.steps=5", "checkpoint.keep=3").code == 0
    truncate(run_of_four / "checkpoints/step_000005")
    assert "resumed after step 4" in urlvr("train", config, "checkpoint.keep=3").out


def test_with_no_intact_checkpoint_left_nothing_is_overwritten(urlvr, config, run_of_four):
    for folder in (run_of_four / "checkpoints").iterdir():
        truncate(folder)
    before = {path: path.read_bytes() for path in run_of_four.rglob("*.jsonl")}
    outcome = urlvr("train", config)
    assert outcome.code == 2
    assert "step_000004 is refused" in outcome.err
    assert "step_000002 is refused" in outcome.err
    assert f"No intact checkpoint is left in {run_of_four}/checkpoints; move the folder away" in outcome.err
    assert before == {path: path.read_bytes() for path in before}
    assert checkpoints(run_of_four) == ["step_000002", "step_000004"]


def test_a_checkpoint_of_something_else_is_refused(urlvr, config, run_of_four):
    manifest = run_of_four / "checkpoints/step_000004/manifest.json"
    good = json.loads(manifest.read_text())
    for content, complaint in (
        ("{}", "has no readable manifest.json"),
        ("[]", "has no readable manifest.json"),
        (json.dumps({**good, "format": 99}), f"format 99, this program reads {FORMAT}"),
        (json.dumps({**good, "model": {**good["model"], "hidden_size": 8192}}), "another model (hidden_size"),
    ):
        manifest.write_text(content)
        assert complaint in verify(manifest.parent, good["model"])
    manifest.write_text(json.dumps(good))
    assert verify(manifest.parent, good["model"]) == ""


def test_an_index_that_would_call_something_is_refused_and_calls_nothing(urlvr, config, run_of_four, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    folder = run_of_four / "checkpoints/step_000004"
    (folder / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Trap()}))
    manifest = json.loads((folder / "manifest.json").read_text())
    size = (folder / ".metadata").stat().st_size
    manifest["files"][".metadata"] = {"bytes": size, "sha256": sha256(folder / ".metadata")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    outcome = urlvr("train", config)
    assert outcome.code == 0
    assert "its index names posix.mkdir, which no checkpoint needs; continuing from" in outcome.err
    assert not (tmp_path / "trapped").exists()


# -- a full disk ------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_when_saving_costs_no_older_checkpoint(urlvr, config, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    original = checkpoint.save

    def save(policy, folder, step, *rest, **options):
        with files_of_at_most(4096 if step == 4 else NO_LIMIT):
            return original(policy, folder, step, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(run_files.checkpoint, "save", save)
        outcome = urlvr("train", config)
    assert outcome.code == 1
    assert f"failed: could not write checkpoint {run}/checkpoints/step_000004: " in outcome.err
    assert "checkpoints written before it are intact" in outcome.err
    assert "Traceback" not in outcome.err
    assert (status(run)["state"], status(run)["step"], status(run)["exit_code"]) == ("failed", 4, 1)
    assert checkpoints(run) == ["step_000002"]

    outcome = urlvr("train", config)
    assert outcome.code == 0
    assert "resumed after step 2" in outcome.out
    assert_same_run(run, whole, step=6)


def test_a_disk_that_is_full_when_preempted_is_told_and_not_hidden(urlvr, config, tmp_path, monkeypatch):
    from small_runs import at_step, send

    original = checkpoint.save

    def save(*arguments, **options):
        with files_of_at_most(4096):
            return original(*arguments, **options)

    with monkeypatch.context() as patch, at_step(monkeypatch, 2, send(15)):
        patch.setattr(run_files.checkpoint, "save", save)
        outcome = urlvr("train", config)
    assert outcome.code == 1
    assert "could not write checkpoint" in outcome.err
    assert status(tmp_path / "run")["state"] == "failed"


def test_a_disk_that_is_full_when_logging_ends_with_a_sentence(urlvr, config, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    original = train.RunFiles.log

    def log(self, step, metrics):
        size = self.folder.metrics.stat().st_size + 20 if step == 3 else NO_LIMIT
        with files_of_at_most(size):
            original(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(train.RunFiles, "log", log)
        outcome = urlvr("train", config)
    assert outcome.code == 1
    assert "failed: no space left ([Errno 27] File too large); free some, and the same command resumes" in outcome.err
    assert (status(run)["state"], status(run)["step"]) == ("failed", 2)
    assert urlvr("train", config).code == 0
    assert_same_run(run, whole, step=6)


# -- what nobody foresaw ----------------------------------------------------------------------------------------------


def test_a_bug_keeps_its_traceback_and_says_so_in_the_status(urlvr, config, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "rows_to_train_on", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        urlvr("train", config)
    found = status(tmp_path / "run")
    assert (found["state"], found["step"], found["exit_code"]) == ("failed", 0, 1)
    assert found["reason"] == "ZeroDivisionError: division by zero"
