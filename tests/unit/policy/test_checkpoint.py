"""Checkpoints: what is loaded is what was saved, to the bit, and training goes on from it."""

from pathlib import Path

import pytest
import torch
from fake_fused_adam import take_fused_adam
from training import SECTION, TRAINER, assert_same_bits, everything, train

from megatron_urlvr.policy import checkpoint
from megatron_urlvr.policy.policy import Policy


def test_an_optimizer_in_host_memory_goes_on_from_another_ones_checkpoint_and_the_other_from_its(make_policy, tmp_path):
    def policy(offload: bool) -> Policy:
        return make_policy(optim=SECTION.model_copy(update={"offload": offload}), model={"dtype": "bfloat16"})

    held: list[tuple[Policy, Path]] = []
    for offload in (False, True):
        held.append((policy(offload), tmp_path / str(offload)))
        train(held[-1][0], 2)
    saved = [checkpoint.save(each, folder, 2, TRAINER, keep=1) for each, folder in held]
    others = [policy(False), policy(True)]
    for other, path in zip(others, reversed(saved), strict=True):
        assert checkpoint.load(other, path) == TRAINER
    for each in (held[0][0], *others):
        train(each, 2)
    for other in others:
        with other.optimizer.resident():
            assert_same_bits(everything(other), everything(held[0][0]))


@pytest.mark.parametrize("distributed", [False, True], ids=["plain optimizer", "distributed optimizer"])
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_training_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(make, tmp_path, name: str, distributed: bool):
    policy = make(name, distributed=distributed)
    train(policy, 3)
    at_save = everything(policy)
    assert {float(value) for key, value in at_save.items() if key.endswith(" step")} == {3.0}
    path = checkpoint.save(policy, tmp_path, 3, TRAINER, keep=1)
    draws = torch.rand(4)
    assert_same_bits(everything(policy), at_save)
    train(policy, 2)
    gone_on = everything(policy)
    for other in (make(name, distributed=distributed), policy):
        torch.manual_seed(12345)
        assert checkpoint.load(other, path) == TRAINER
        assert_same_bits(everything(other), at_save)
        assert torch.equal(torch.rand(4), draws)
        train(other, 2)
        assert_same_bits(everything(other), gone_on)


def test_a_policy_that_was_never_stepped_is_saved_and_loaded(make, tmp_path):
    policy = make()
    path = checkpoint.save(policy, tmp_path, 0, {"step": 0}, keep=1)
    other = make()
    train(other, 1)
    assert checkpoint.load(other, path) == {"step": 0}
    train(policy, 2)
    train(other, 2)
    for name, tensor in everything(policy).items():
        if name.startswith("weight"):
            assert torch.equal(everything(other)[name], tensor), name


@pytest.mark.parametrize("distributed", [False, True], ids=["plain optimizer", "distributed optimizer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformer_engines_adam_goes_on_from_a_checkpoint_of_a_run_that_was_continued(
    make_policy, monkeypatch, tmp_path, distributed, dtype
):
    def make() -> Policy:
        parallel = {"distributed_optimizer": distributed}
        return make_policy(optim=SECTION, parallel=parallel, model={"dtype": dtype})

    take_fused_adam(monkeypatch)
    policy, other = make(), make()
    train(policy, 2)
    checkpoint.load(other, checkpoint.save(policy, tmp_path / "first", 2, TRAINER, keep=1))
    train(policy, 1)
    train(other, 1)
    third = make()
    checkpoint.load(third, checkpoint.save(other, tmp_path / "second", 3, TRAINER, keep=1))
    train(policy, 2)
    train(third, 2)
    assert_same_bits(everything(third), everything(policy))


def test_transformer_engines_adam_begins_anew_from_a_policy_that_was_never_stepped(make, monkeypatch, tmp_path):
    take_fused_adam(monkeypatch)
    policy, other = make(), make()
    path = checkpoint.save(policy, tmp_path, 0, TRAINER, keep=1)
    train(other, 3)
    checkpoint.load(other, path)
    train(policy, 2)
    train(other, 2)
    assert_same_bits(everything(other), everything(policy))


def test_the_newest_are_kept_and_found_in_order_of_their_steps(make, tmp_path):
    policy = make()
    for step in (2, 1000000, 30):
        checkpoint.save(policy, tmp_path, step, {}, keep=2)
    (tmp_path / ".step_000031.writing").mkdir()
    (tmp_path / "step_x").mkdir()
    assert checkpoint.list_checkpoints(tmp_path) == [
        (1000000, tmp_path / "step_1000000"),
        (30, tmp_path / "step_000030"),
    ]
    assert checkpoint.list_checkpoints(tmp_path / "nowhere") == []
    assert checkpoint.newest_intact(policy, tmp_path / "nowhere") == (None, [])
