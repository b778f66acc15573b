"""Checkpoints that are damaged, foreign or hostile: refused, unread where they would run code, and without a trace."""

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from training import TRAINER, assert_same_bits, everything, train

from megatron_urlvr.policy import checkpoint
from megatron_urlvr.policy.checkpoint import CheckpointError
from megatron_urlvr.policy.contents import sharded_state


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
