"""Checkpoints that cannot be written, or not to their end: those before them are left, and so is the policy."""

import errno
import os
from pathlib import Path

import pytest
import torch
from full_disk import files_of_at_most
from training import TRAINER, assert_same_bits, everything, train

from megatron_urlvr.policy import checkpoint
from megatron_urlvr.policy.checkpoint import CheckpointError
from megatron_urlvr.policy.policy import Policy


def assert_older_one_is_intact(policy: Policy, folder: Path, before: dict[str, torch.Tensor]) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["step_000001", "step_000002"]
    assert_same_bits(everything(policy), before)
    assert checkpoint.newest_intact(policy, folder) == (folder / "step_000002", [])
    assert checkpoint.save(policy, folder, 3, TRAINER, keep=2) == folder / "step_000003"
    assert checkpoint.load(policy, folder / "step_000003") == TRAINER


@pytest.mark.parametrize("limit", [0, 1000, 30_000], ids=["nothing", "the index does not fit", "the shards do not fit"])
def test_a_disk_that_fills_up_leaves_the_old_checkpoints(make, copies: Path, limit: int):
    policy = make()
    train(policy, 1)
    before = everything(policy)
    with files_of_at_most(limit), pytest.raises(CheckpointError) as failed:
        checkpoint.save(policy, copies, 3, TRAINER, keep=2)
    assert "could not write checkpoint" in str(failed.value)
    assert str(failed.value).endswith("checkpoints written before it are intact")
    assert_older_one_is_intact(policy, copies, before)


@pytest.mark.parametrize("place", ["manifest", "trainer", "rename", "random state"])
def test_no_space_left_at_any_later_moment_leaves_the_old_checkpoints(make, copies: Path, monkeypatch, place: str):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    policy = make()
    train(policy, 1)
    before = everything(policy)
    with monkeypatch.context() as patch:
        if place == "rename":
            patch.setattr(os, "replace", full)
        elif place == "random state":
            patch.setattr(checkpoint, "save_rng", full)
        elif place == "manifest":
            patch.setattr(checkpoint, "write_manifest", full)
        else:
            write = Path.write_text
            patch.setattr(
                Path, "write_text", lambda p, *a, **k: full() if p.name == "trainer.json" else write(p, *a, **k)
            )
        with pytest.raises(CheckpointError, match="No space left on device"):
            checkpoint.save(policy, copies, 3, TRAINER, keep=2)
    assert_older_one_is_intact(policy, copies, before)


def test_a_folder_that_cannot_be_made_is_said(make, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not write checkpoint"):
        checkpoint.save(make(), tmp_path / "file", 1, {}, keep=1)


def test_what_a_broken_off_save_left_behind_is_overwritten(make, copies: Path):
    left = copies / ".step_000003.writing"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    policy = make()
    checkpoint.save(policy, copies, 3, TRAINER, keep=5)
    assert not left.exists()
    assert checkpoint.load(policy, copies / "step_000003") == TRAINER


def test_a_process_killed_while_it_replaces_its_only_checkpoint_leaves_one(make, tmp_path: Path, monkeypatch):
    policy, there = make(), tmp_path / "step_000001"
    checkpoint.save(policy, tmp_path, 1, {"life": 1}, keep=1)
    replace = os.replace

    def killed(source, target):
        if Path(target) == there:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(policy, tmp_path, 1, {"life": 2}, keep=1)
    path, problems = checkpoint.newest_intact(policy, tmp_path)
    assert (path is None, problems) == (False, [])
    assert checkpoint.load(policy, path) == {"life": 1}

    checkpoint.save(policy, tmp_path, 1, {"life": 3}, keep=1)
    assert [found.name for found in tmp_path.iterdir()] == [there.name]
    assert checkpoint.load(policy, there) == {"life": 3}
