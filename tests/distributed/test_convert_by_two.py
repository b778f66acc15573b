"""Two processes convert what one does, share for share; what stops one of them, both say."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_family

from megatron_urlvr.policy.convert import to_hf, to_megatron
from megatron_urlvr.policy.hf.folder import INDEX

SHARD = 9000
"""Bytes of a file: several for each process."""
CONVERT = """
import sys
from pathlib import Path
from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.policy.convert import met, to_hf, to_megatron

root, model, damaged = map(Path, sys.argv[2:])
with met():
    to_megatron(model, root / "megatron")
    to_hf(root / "megatron", root / "hf", model=model, max_shard_bytes=int(sys.argv[1]))
    try:
        to_megatron(damaged, root / "never")
    except UnusableInput as error:
        print("told:", error)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("model") / "qwen3_moe", "qwen3_moe")


@pytest.fixture(scope="module")
def damaged(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tensor of another shape, in the share of the second process."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "config.json").write_text((model / "config.json").read_text())
    save_file(
        load_file(model / "model.safetensors") | {"model.norm.weight": torch.ones(3)}, folder / "model.safetensors"
    )
    return folder


@pytest.fixture(scope="module")
def converted(model: Path, damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """What two processes wrote, and what each said."""
    out = tmp_path_factory.mktemp("by_two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CONVERT, str(SHARD), str(out), str(model), str(damaged)]
    pipe = subprocess.PIPE
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **meeting, "RANK": str(rank)}, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    return out, said


def test_both_ways_give_every_bit(converted, model: Path, tmp_path: Path):
    out, _ = converted
    to_megatron(model, tmp_path / "megatron")
    to_hf(out / "megatron", tmp_path / "hf", model=model, max_shard_bytes=SHARD)
    files = sorted(file.name for file in (tmp_path / "hf").iterdir())
    assert sorted(file.name for file in (out / "hf").iterdir()) == files
    assert len(list((out / "hf").glob("*.safetensors"))) > 4
    assert json.loads((out / "hf" / INDEX).read_text()) == json.loads((tmp_path / "hf" / INDEX).read_text())
    expected = load_file(model / "model.safetensors")
    for folder in (out / "hf", tmp_path / "hf"):
        found = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_each_process_writes_a_part(converted):
    out, _ = converted
    sizes = [(out / "megatron" / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert min(sizes) > 0.2 * max(sizes)


def test_what_stops_one_process_is_said_by_both_and_nothing_is_written(converted):
    out, said = converted
    for each in said:
        assert "told: model.path = " in each
        assert "tensor model.norm.weight has shape (3,), expected (32,)" in each
    assert not (out / "never").exists()
