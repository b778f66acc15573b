"""Chunks of a checkpoint: rows and columns of a tensor, in archives that torch reads; what is damaged is named."""

import os
from pathlib import Path

import pytest
import torch

from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.policy.rows import Copier, Rows, numbered
from megatron_urlvr.policy.torch_dist import METADATA, Checkpoint, Chunk, write_archive, write_index

SHAPE = (2, 6, 4)
"""Two layers of a matrix."""
LAYERS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()


def write_checkpoint(folder: Path, *, columns: int = 1, rows: int = 1, missing: int = -1) -> Path:
    """A checkpoint of LAYERS, each layer in this many chunks across and down; the chunk `missing` is left out."""
    folder.mkdir()
    height, width = SHAPE[1] // rows, SHAPE[2] // columns
    corners = [(i, r, c) for i in range(2) for r in range(0, SHAPE[1], height) for c in range(0, SHAPE[2], width)]
    chunks = []
    with open(folder / "__0_0.distcp", "wb") as file:
        for layer, row, column in corners:
            start = file.tell()
            torch.save(LAYERS[layer : layer + 1, row : row + height, column : column + width].clone(), file)
            place = (layer, row, column), (1, height, width)
            chunks.append(Chunk(*place, "__0_0.distcp", start, file.tell() - start))
    if missing >= 0:
        del chunks[missing]
    write_index(folder, {"w": (SHAPE, torch.bfloat16, chunks)})
    return folder


def values(rows: list[Rows], path: Path) -> torch.Tensor:
    """A layer, copied out of a checkpoint."""
    with open(path, "wb") as file, Copier(file) as copier:
        copier.copy(numbered(SHAPE[1:], 1), rows, SHAPE[2] * 2, 0)
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.bfloat16).view(SHAPE[1:])


@pytest.mark.parametrize(("columns", "rows", "in_memory"), [(1, 1, False), (1, 3, False), (2, 1, True), (4, 2, True)])
def test_an_entry_is_whole_whatever_chunks_it_lies_in(tmp_path: Path, columns: int, rows: int, in_memory: bool):
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "x", columns=columns, rows=rows))
    assert checkpoint.shapes == {"w": SHAPE}
    for layer in range(2):
        found = checkpoint.entry("w", (layer,))
        assert any(isinstance(each.source, torch.Tensor) for each in found) == in_memory
        assert torch.equal(values(found, tmp_path / "out"), LAYERS[layer])


def test_torch_reads_an_archive_whose_bytes_were_filled_in_and_finds_zeros_elsewhere(tmp_path: Path):
    with open(tmp_path / "file", "x+b") as file:
        file.write(b"before")
        at, length = write_archive(file, (6, 4), torch.bfloat16)
        file.seek(0, os.SEEK_END)
        second, _ = write_archive(file, (3,), torch.float64)
        os.pwrite(file.fileno(), LAYERS[0, :5].view(torch.uint8).numpy().tobytes(), at)
    data = (tmp_path / "file").read_bytes()
    (tmp_path / "one").write_bytes(data[6 : 6 + length])
    (tmp_path / "two").write_bytes(data[6 + length :])
    expected = torch.cat([LAYERS[0, :5], torch.zeros(1, 4, dtype=torch.bfloat16)])
    assert torch.equal(torch.load(tmp_path / "one", weights_only=True), expected)
    assert torch.equal(torch.load(tmp_path / "two", weights_only=True), torch.zeros(3, dtype=torch.float64))
    assert second > 6 + length


# -- what is damaged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 2])
def test_a_chunk_that_the_index_lacks_is_missed(tmp_path: Path, columns: int):
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "x", columns=columns, rows=2, missing=0))
    with pytest.raises(
        UnusableInput, match=r"x: parts of tensor w \(entry 0\) are missing; copy the checkpoint again$"
    ):
        checkpoint.entry("w", (0,))
    assert torch.equal(values(checkpoint.entry("w", (1,)), tmp_path / "out"), LAYERS[1])


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 30)


@pytest.mark.parametrize("damage", [cut, Path.unlink, lambda file: file.write_bytes(bytes(file.stat().st_size))])
def test_a_file_that_is_cut_gone_or_overwritten_is_named(tmp_path: Path, damage):
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "x"))
    damage(tmp_path / "x" / "__0_0.distcp")
    with pytest.raises(
        UnusableInput,
        match=r"__0_0\.distcp: tensor w cannot be read \((its archive is damaged|No such file .*)\); copy",
    ):
        checkpoint.entry("w", (1,))


def test_an_archive_of_another_tensor_than_the_indexs_is_named(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "x")
    checkpoint = Checkpoint(folder)
    with open(folder / "__0_0.distcp", "wb") as file:
        torch.save(torch.zeros(1, 6, 4), file)
        length = file.tell()
    chunk = Chunk((0, 0, 0), (1, 6, 4), "__0_0.distcp", 0, length)
    write_index(folder, {"w": ((1, 6, 4), torch.bfloat16, [chunk])})
    checkpoint = Checkpoint(folder)
    with pytest.raises(UnusableInput, match=r"__0_0\.distcp: tensor w is not what the index says"):
        checkpoint.entry("w", (0,))


def test_an_index_of_something_else_is_refused(tmp_path: Path):
    write_checkpoint(tmp_path / "x")
    (tmp_path / "x" / METADATA).write_bytes(b"\x80\x04N.")
    with pytest.raises(UnusableInput, match=r"\.metadata: it is no index of a checkpoint"):
        Checkpoint(tmp_path / "x")
