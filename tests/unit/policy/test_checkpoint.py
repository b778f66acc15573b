"""Checkpoints: what is loaded is what was saved, to the bit; what is damaged, foreign or hostile is refused unread."""

import errno
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_fused_adam import take_fused_adam
from full_disk import files_of_at_most
from megatron.core.dist_checkpointing.mapping import ShardedObject
from test_weights import Likelihood, rows

from megatron_urlvr.config.optim import OptimSection
from megatron_urlvr.policy import checkpoint
from megatron_urlvr.policy.checkpoint import CheckpointError
from megatron_urlvr.policy.contents import sharded_state
from megatron_urlvr.policy.policy import Policy

SECTION = OptimSection(lr=1e-2, ema_decay=0.8, weight_decay=0.1)
TRAINER = {"step": 3, "stream": {"epoch": 1}}


@pytest.fixture
def make(make_policy):
    def make(name: str = "untied", *, distributed: bool = True) -> Policy:
        return make_policy(name, optim=SECTION, parallel={"distributed_optimizer": distributed})

    return make


@pytest.fixture(scope="module")
def saved(make_policy, tmp_path_factory) -> Path:
    """A folder of checkpoints after steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    policy = make_policy(optim=SECTION)
    for step in (1, 2):
        train(policy, 1)
        checkpoint.save(policy, folder, step, {"step": step}, keep=2)
    return folder


@pytest.fixture
def copies(saved: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def train(policy: Policy, steps: int) -> None:
    for _ in range(steps):
        policy.update(rows(), Likelihood(), lr=1e-2)


def everything(policy: Policy) -> dict[str, torch.Tensor]:
    """Weights, moments, step counts and moving average, copied."""
    found = {f"weight {name}": p.detach().clone() for name, p in policy.parameters.items()}
    assert policy.optimizer is not None
    for part in policy.optimizer.parts:
        for i, state in enumerate(part.optimizer.state.values()):
            found |= {f"moment {i} {name}": torch.as_tensor(value).clone() for name, value in state.items()}
    if policy.ema is not None:
        found |= {f"ema {name}": tensor.clone() for name, tensor in policy.ema.tensors.items()}
    return found


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


# -- what is saved is what is loaded ----------------------------------------------------------------------------------


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


# -- what is refused --------------------------------------------------------------------------------------------------


def shards(path: Path) -> Path:
    return sorted(path.glob("*.distcp"))[0]


def cut(path: Path) -> None:
    os.truncate(shards(path), shards(path).stat().st_size - 100)


def change_a_byte(path: Path) -> None:
    data = bytearray(shards(path).read_bytes())
    data[len(data) // 2] ^= 1
    shards(path).write_bytes(data)


def change_manifest(path: Path, **fields: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **fields}))


DAMAGE = {
    "cut off": (cut, r"__0_0\.distcp holds \d+ bytes of \d+"),
    "one bit": (change_a_byte, r"the contents of __0_0\.distcp have changed"),
    "a file gone": (lambda path: (path / "common.pt").unlink(), r"common\.pt is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), r"no readable manifest\.json"),
    "half a manifest": (lambda path: os.truncate(path / "manifest.json", 200), r"no readable manifest\.json"),
    "another manifest": (lambda path: (path / "manifest.json").write_text("[1]"), r"no readable manifest\.json"),
    "another format": (lambda path: change_manifest(path, format=99), "format 99, this program reads 2"),
    "trainer state": (lambda path: (path / "trainer.json").write_text("{}"), r"trainer\.json holds 2 bytes of \d+"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(make, copies: Path, what: str):
    damage, sentence = DAMAGE[what]
    newest = copies / "step_000002"
    damage(newest)
    policy = make()
    path, problems = checkpoint.newest_intact(policy, copies)
    assert path == copies / "step_000001"
    assert len(problems) == 1
    pytest.raises(CheckpointError, checkpoint.load, policy, newest).match(sentence)
    pytest.raises(CheckpointError, checkpoint.load, policy, newest).match(f"checkpoint {newest} is refused: ")
    assert checkpoint.load(policy, path) == {"step": 1}


def test_a_refused_checkpoint_changes_nothing(make, copies: Path):
    change_a_byte(copies / "step_000002")
    policy = make()
    train(policy, 1)
    before = everything(policy)
    with pytest.raises(CheckpointError):
        checkpoint.load(policy, copies / "step_000002")
    assert_same_bits(everything(policy), before)


@pytest.mark.parametrize(
    ("name", "distributed", "differing"),
    [("tied", True, "tie_word_embeddings"), ("untied", False, "optimizer")],
)
def test_a_checkpoint_of_another_model_or_optimizer_is_refused(
    make, saved, name: str, distributed: bool, differing: str
):
    policy = make(name, distributed=distributed)
    path, problems = checkpoint.newest_intact(policy, saved)
    assert path is None
    assert len(problems) == 2
    assert problems[0].endswith(f"it belongs to another model ({differing} differ)")


def test_models_that_differ_in_any_size_or_numeric_setting_are_foreign_to_each_other(make, folders, saved):
    """The same names and layers, but other heads: the fused tensors have one shape and another meaning."""
    policy = make()
    changes = {
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "intermediate_size": 96,
        "rope_parameters": {"rope_theta": 1e6},
        "rms_norm_eps": 1e-3,
    }
    for key, value in changes.items():
        policy.hf = {**policy.hf, key: value}
        assert checkpoint.newest_intact(policy, saved)[0] is None, key
        policy.hf = json.loads((folders["untied"] / "config.json").read_text())
    assert checkpoint.newest_intact(policy, saved)[0] == saved / "step_000002"


class Runs:
    """Unpickling this calls `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def global_named(module: str, name: str, *arguments: bytes) -> bytes:
    """A pickle that names a global by its protocol 0 opcode and calls it."""
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR."


def named_through_the_memo(module: str, name: str, argument: str) -> bytes:
    """A pickle whose name of the global lies far before its use, with harmless strings in between."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    harmless = text("torch") + text("Size") + b"00"
    return (
        b"\x80\x04" + text(module) + b"\x94" + text(name) + b"\x940" + b"0" + harmless
        + b"h\x00h\x01\x93" + text(argument) + b"\x85R."
    )  # fmt: skip


def hostile_indexes(marker: Path) -> dict[str, bytes]:
    """Pickles that would create `marker` when loaded."""
    command = f"mkdir {marker}"
    argument = f"V{command}\n".encode()
    return {
        "a class": pickle.dumps(Runs(os.mkdir, str(marker))),
        "beside a real index": pickle.dumps({"x": torch.Size([1]), "y": Runs(os.mkdir, str(marker))}),
        "eval": pickle.dumps(Runs(eval, f"__import__('os').mkdir({str(marker)!r})")),
        "by name": global_named("os", "system", argument),
        "through torch": named_through_the_memo("torch", "os.system", command),
        "through a module of the index": named_through_the_memo(
            "torch.distributed.checkpoint.filesystem", "os.system", command
        ),
        "through the memo": named_through_the_memo("os", "system", command),
        "loading more": global_named("torch.serialization", "load", argument),
    }


@pytest.mark.parametrize("kind", hostile_indexes(Path("x")))
def test_an_index_that_would_run_code_is_refused_without_running_it(make, copies: Path, tmp_path: Path, kind: str):
    marker = tmp_path / "marker"
    index = hostile_indexes(marker)[kind]
    replace_file(copies / "step_000002", ".metadata", index)
    policy = make()
    path, problems = checkpoint.newest_intact(policy, copies)
    assert path == copies / "step_000001"
    assert "its index names" in problems[0]
    with pytest.raises(CheckpointError, match="which no checkpoint needs"):
        checkpoint.load(policy, copies / "step_000002")
    assert not marker.exists()
    # The attack is a real one: read by pickle, the index does what it says.
    if kind != "loading more":
        pickle.loads(index)
        assert marker.exists()


def replace_file(path: Path, name: str, content: bytes) -> None:
    """Put `content` in a checkpoint, with a manifest that agrees."""
    (path / name).write_bytes(content)
    files = json.loads((path / "manifest.json").read_text())["files"]
    files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(path, files=files)


def test_an_index_that_is_no_pickle_is_refused(make, copies: Path):
    replace_file(copies / "step_000002", ".metadata", b"\x80\x04not a pickle")
    with pytest.raises(CheckpointError, match="its index cannot be read"):
        checkpoint.load(make(), copies / "step_000002")


def with_object(original: Any, data: Any) -> Any:
    """`sharded_state` with what a layer may keep beside its parameters."""

    def more(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state = original(*args, **kwargs)
        state["model0"][LAYER_STATE] = ShardedObject(LAYER_STATE, data, (1,), (0,))
        return state

    return more


LAYER_STATE = "decoder.final_layernorm._extra_state"


def test_an_object_among_the_tensors_that_would_run_code_is_not_loaded(make, tmp_path: Path, monkeypatch):
    """Megatron stores objects as pickles of their own inside the shards."""
    marker = tmp_path / "marker"
    policy = make()
    train(policy, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sharded_state", with_object(sharded_state, Runs(os.mkdir, str(marker))))
        path = checkpoint.save(policy, tmp_path, 1, {}, keep=1)
        assert not marker.exists()
        with pytest.raises(CheckpointError, match="cannot be read safely"):
            checkpoint.load(policy, path)
    checkpoint.load(policy, path)
    assert not marker.exists()


def test_what_layers_keep_beside_their_parameters_is_neither_saved_nor_loaded(make, tmp_path: Path, monkeypatch):
    """Transformer Engine keeps bytes in a tensor, which torch loads without a question, and unpickles them itself."""
    marker = tmp_path / "marker"
    policy, other = make(), make()
    train(policy, 1)
    layer = policy.chunks[0].decoder.final_layernorm
    pickled = torch.frombuffer(bytearray(pickle.dumps(Runs(os.mkdir, str(marker)))), dtype=torch.uint8)
    monkeypatch.setattr(type(layer), "get_extra_state", lambda self: pickled, raising=False)
    monkeypatch.setattr(type(layer), "set_extra_state", lambda self, state: pickle.loads(state.numpy().tobytes()))
    path = checkpoint.save(policy, tmp_path, 1, TRAINER, keep=1)
    assert checkpoint.load(other, path) == TRAINER
    assert_same_bits(everything(other), everything(policy))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sharded_state", with_object(sharded_state, pickled))
        path = checkpoint.save(policy, tmp_path, 2, TRAINER, keep=1)
    assert checkpoint.load(other, path) == TRAINER
    assert not marker.exists()


# -- what cannot be written -------------------------------------------------------------------------------------------


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
