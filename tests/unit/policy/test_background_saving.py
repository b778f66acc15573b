"""Checkpoints written while training goes on: what they hold, and what becomes of them when something goes wrong."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from full_disk import files_of_at_most
from training import SECTION, TRAINER, assert_same_bits, everything, train

from megatron_urlvr.policy import checkpoint, writing
from megatron_urlvr.policy.checkpoint import CheckpointError, Saving
from megatron_urlvr.policy.policy import Policy

Gate = threading.Event


def stepped(make_policy, *, distributed: bool = True) -> Policy:
    """A policy after one step."""
    policy = make_policy(optim=SECTION, parallel={"distributed_optimizer": distributed})
    train(policy, 1)
    return policy


@pytest.fixture
def policy(make_policy) -> Policy:
    return stepped(make_policy)


@pytest.fixture
def gate(monkeypatch) -> Iterator[Gate]:
    """No file gets further than its second tensor before this is set."""
    opened, written = threading.Event(), writing._write_item
    seen: list[str] = []

    def held(transforms, stream, data, item, key, form):
        seen.append(key)
        if seen.count(key) > 1:
            assert opened.wait(60)
        return written(transforms, stream, data, item, key, form)

    monkeypatch.setattr(writing, "_write_item", held)
    yield opened
    opened.set()


def shards(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.distcp")}


@pytest.mark.parametrize("distributed", [False, True], ids=["plain optimizer", "distributed optimizer"])
def test_training_goes_on_and_the_checkpoint_holds_what_was_there_at_its_beginning(
    make_policy, gate, tmp_path, distributed: bool
):
    policy = stepped(make_policy, distributed=distributed)
    gate.set()
    expected = checkpoint.save(policy, tmp_path / "waited", 1, TRAINER, keep=1)
    at_begin = everything(policy)
    gate.clear()

    saving = Saving(policy, tmp_path, 1, TRAINER, keep=1)
    assert not saving.written()
    train(policy, 2)
    gone_on = everything(policy)
    assert checkpoint.list_checkpoints(tmp_path) == []
    assert checkpoint.newest_intact(policy, tmp_path) == (None, [])
    gate.set()
    path = saving.finish()
    assert saving.written()

    assert shards(path) == shards(expected)
    found, wanted = (json.loads((each / "manifest.json").read_text()) for each in (path, expected))
    assert found["files"].keys() == wanted["files"].keys()
    assert {key: found[key] for key in found if key != "files"} == {key: wanted[key] for key in found if key != "files"}
    assert checkpoint.newest_intact(policy, tmp_path) == (path, [])
    assert checkpoint.load(policy, path) == TRAINER
    assert_same_bits(everything(policy), at_begin)
    train(policy, 2)
    assert_same_bits(everything(policy), gone_on)


def test_a_policy_whose_first_step_is_taken_meanwhile_is_saved_without_moments(make_policy, gate, tmp_path):
    policy = make_policy(optim=SECTION)
    saving = Saving(policy, tmp_path, 0, {"step": 0}, keep=1)
    train(policy, 1)
    gate.set()
    path = saving.finish()
    assert json.loads((path / "manifest.json").read_text())["stepped"] is False
    assert checkpoint.load(policy, path) == {"step": 0}
    assert all(not part.optimizer.state for part in policy.optimizer.parts)


def test_the_trainers_state_is_that_of_the_beginning(policy, tmp_path):
    state = {"step": 1, "stream": {"place": 4}}
    saving = Saving(policy, tmp_path, 1, state, keep=1)
    state["stream"]["place"] = 5
    assert checkpoint.load(policy, saving.finish()) == {"step": 1, "stream": {"place": 4}}


@pytest.mark.parametrize("limit", [1000, 30_000], ids=["the index does not fit", "the shards do not fit"])
def test_a_disk_that_fills_up_meanwhile_is_told_at_the_end_and_leaves_the_old_checkpoint(policy, gate, tmp_path, limit):
    gate.set()
    old = checkpoint.save(policy, tmp_path, 1, {"step": 1}, keep=2)
    gate.clear()
    saving = Saving(policy, tmp_path, 2, TRAINER, keep=1)
    with files_of_at_most(limit):
        gate.set()
        with pytest.raises(CheckpointError) as failed:
            saving.finish()
    assert str(failed.value).startswith(f"could not write checkpoint {tmp_path}/step_000002: [Errno 27] File too large")
    assert str(failed.value).endswith("checkpoints written before it are intact")
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert checkpoint.newest_intact(policy, tmp_path) == (old, [])
    assert checkpoint.load(policy, checkpoint.save(policy, tmp_path, 2, TRAINER, keep=1)) == TRAINER


def test_what_is_given_up_in_the_middle_is_no_checkpoint(policy, gate, tmp_path):
    gate.set()
    old = checkpoint.save(policy, tmp_path, 1, {"step": 1}, keep=1)
    gate.clear()
    saving = Saving(policy, tmp_path, 2, TRAINER, keep=1)
    giving_up = threading.Thread(target=saving.abandon)
    giving_up.start()
    assert saving._part is not None
    assert saving._part._stopped.wait(60)
    gate.set()
    giving_up.join(60)
    assert [thread.name for thread in threading.enumerate() if thread.name == "checkpoint"] == []
    assert checkpoint.newest_intact(policy, tmp_path) == (old, [])
    assert os.listdir(tmp_path / ".step_000002.writing")
    assert checkpoint.save(policy, tmp_path, 2, TRAINER, keep=1) == tmp_path / "step_000002"
    assert not (tmp_path / ".step_000002.writing").exists()


def test_copies_are_the_writers_own_and_their_memory_is_free_when_they_are_written(policy, gate, tmp_path):
    saving = Saving(policy, tmp_path, 1, TRAINER, keep=1)
    assert saving._part is not None
    assert policy.ema is not None
    files = [tensors for _, _, (_, tensors) in saving._part._writer.write_buckets]
    held = {tensor.untyped_storage().data_ptr() for tensors in files for _, tensor in list(tensors)}
    live = {t.untyped_storage().data_ptr() for t in (*policy.parameters.values(), *policy.ema.tensors.values())}
    assert held
    assert not held & live
    gate.set()
    saving.finish()
    assert not any(files)
