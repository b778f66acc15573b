"""Buckets hold every tensor to the bit, and a snapshot made of them is a folder that safetensors reads."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_urlvr.rollout.weight_sync.buckets import Bucket, buckets
from megatron_urlvr.rollout.weight_sync.snapshot import Snapshots

TYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64]


def tensors(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Tensors of mixed types and shapes, one of them empty-dimensional, one a view that is not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        f"layer.{k}.weight": torch.randn(1 + k % 3, 2 + k % 5, generator=generator).mul(100).to(TYPES[k % len(TYPES)])
        for k in range(count)
    }
    made["scalar"] = torch.tensor(3.5)
    made["view"] = torch.arange(12.0).reshape(3, 4).t()
    return made


def contents(bucket: Bucket) -> dict[str, torch.Tensor]:
    """As a server takes it apart: by the request's names, types and shapes, in order."""
    request, start, found = bucket.request(), 0, {}
    if "load_format" not in request:  # a tensor for each name
        return dict(zip(request["names"], bucket.tensors(), strict=True))
    assert request["load_format"] == "flattened_bucket"
    for name, kind, shape in zip(request["names"], request["dtypes"], request["shapes"], strict=True):
        dtype = getattr(torch, kind)
        size = dtype.itemsize * torch.Size(shape).numel()
        found[name] = bucket.flat[start : start + size].view(dtype).reshape(shape)
        start += size
    assert start == bucket.flat.numel()
    return found


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 12), st.integers(1, 400), st.integers(0, 99), st.booleans())
def test_buckets_hold_every_tensor_once_and_to_the_bit(count: int, limit: int, seed: int, packed: bool) -> None:
    given_tensors, found = tensors(count, seed), {}
    for bucket in buckets(iter(given_tensors.items()), limit, packed=packed):
        part = contents(bucket)
        assert bucket.size == bucket.flat.numel() == sum(t.nbytes for t in part.values())
        assert not found.keys() & part.keys()
        assert bucket.flat.numel() <= limit or len(part) == 1
        found |= part
    assert found.keys() == given_tensors.keys()
    for name, tensor in given_tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_tensors_that_share_a_bucket_are_copied_and_one_alone_is_not() -> None:
    weight, other = torch.ones(4), torch.ones(4)
    [shared] = buckets([("w", weight), ("v", other)], 1000)
    [alone] = buckets([("w", weight)], 1000)
    assert (shared.own, alone.own) == (True, False)
    weight.zero_()
    assert torch.equal(contents(shared)["w"], torch.ones(4))
    assert torch.equal(contents(alone)["w"], torch.zeros(4))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"vocab_size": 3}')
    (folder / "model.safetensors").write_bytes(b"the weights it started with")
    return folder


def test_a_snapshot_is_a_folder_that_safetensors_reads_and_only_the_newest_stays(tmp_path: Path, model: Path) -> None:
    snapshots = Snapshots(tmp_path / "weights", model)
    for version in (1, 2):
        wanted = tensors(6, version)
        snapshots.begin(f"s-{version}")
        for bucket in buckets(iter(wanted.items()), 64):
            snapshots.add(bucket)
        folder = snapshots.commit().result()
        assert [path.name for path in (tmp_path / "weights").iterdir()] == [f"s-{version}"]
        assert (folder / "config.json").read_text() == '{"vocab_size": 3}'
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert index.keys() == wanted.keys()
        files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
        assert sorted(files) == sorted(set(index.values()))
        for name, tensor in wanted.items():
            assert torch.equal(files[index[name]][name], tensor)
        with safe_open(folder / index["scalar"], "pt") as file:
            assert file.metadata() == {"format": "pt"}
    snapshots.close()
    assert not (tmp_path / "weights").exists()


def test_a_snapshot_that_cannot_be_written_says_so(tmp_path: Path, model: Path) -> None:
    snapshots = Snapshots(tmp_path / "weights", model)
    snapshots.begin("s-1")
    (tmp_path / "weights" / "s-1.partial" / "config.json").unlink()
    (tmp_path / "weights" / "s-1.partial").rmdir()
    [bucket] = buckets([("w", torch.ones(2))], 1000)
    snapshots.add(bucket)
    with pytest.raises(FileNotFoundError):
        snapshots.commit().result()


def test_a_snapshot_keeps_its_values_when_the_policy_moves_on(model: Path, tmp_path: Path) -> None:
    snapshots, weight, gate = Snapshots(tmp_path / "snapshots", model), torch.ones(4), threading.Event()
    snapshots.begin("a")
    snapshots._writer.submit(gate.wait)  # the disk is slow
    for bucket in buckets([("w", weight)], 1000):
        snapshots.add(bucket)
    ready = snapshots.commit()
    weight.zero_()
    gate.set()
    assert torch.equal(load_file(ready.result() / "model-00000.safetensors")["w"], torch.ones(4))
    snapshots.close()
