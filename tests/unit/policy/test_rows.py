"""Rows copied from file to file lie as indexing in memory puts them, at any pace; files that end early are named."""

import os
from pathlib import Path

import pytest
import torch

from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.policy import rows
from megatron_urlvr.policy.rows import PADDING, Copier, Rows, numbered, runs

WIDTH = 96
"""Bytes of a row."""
HEAD = 13
"""Bytes before the rows of every file."""


@pytest.fixture(params=["at once", "a few bytes at a time"])
def pace(request, monkeypatch):
    if request.param == "at once":
        return
    real = os.pwrite
    monkeypatch.setattr(rows, "BUFFER", 50)
    monkeypatch.setattr(os, "pwrite", lambda target, data, at: real(target, data[:7], at))


@pytest.fixture
def whole() -> torch.Tensor:
    return torch.randint(0, 256, (40, WIDTH), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def held(whole, tmp_path: Path) -> list[Rows]:
    """Rows 1 to 40: the first in a file, the next in another, the last in memory."""
    found, first = [], 1
    for name, count in (("a", 7), ("b", 21)):
        rows = whole[first - 1 : first - 1 + count]
        (tmp_path / name).write_bytes(bytes(HEAD) + rows.numpy().tobytes() + b"what follows")
        found.append(Rows(first, count, tmp_path / name, HEAD))
        first += count
    return [*found, Rows(first, 12, whole[first - 1 :])]


def copied(numbers: torch.Tensor, held: list[Rows], path: Path) -> torch.Tensor:
    with open(path, "wb") as file, Copier(file) as copier:
        file.truncate(HEAD + len(numbers) * WIDTH)
        copier.copy(numbers, held, WIDTH, HEAD)
    return torch.frombuffer(bytearray(path.read_bytes()[HEAD:]), dtype=torch.uint8).view(-1, WIDTH)


@pytest.mark.parametrize("seed", range(3))
def test_rows_in_any_order_with_padding_between_them_lie_as_indexing_puts_them(
    pace, whole, held, tmp_path: Path, seed: int
):
    blocks = torch.arange(1, 41).view(10, 4)[torch.randperm(10, generator=torch.Generator().manual_seed(seed))]
    numbers = torch.cat(
        [torch.tensor([PADDING, PADDING]), blocks[:5].flatten(), torch.tensor([PADDING]), blocks[5:, :3].flatten()]
    )
    expected = torch.cat([torch.zeros(1, WIDTH, dtype=torch.uint8), whole])[numbers]
    assert torch.equal(copied(numbers[:, None], held, tmp_path / "out"), expected)


def test_rows_that_follow_each_other_are_one_copy():
    assert list(runs(numbered((1000, 5), 1))) == [(0, 1, 1000)]
    assert list(runs(torch.tensor([0, 1, 2, 0, 0, 1, 7, 8]))) == [(1, 1, 2), (5, 1, 1), (6, 7, 2)]
    assert list(runs(torch.tensor([0, 0]))) == []
    assert numbered((3, 5), 4).tolist() == [[4], [5], [6]]
    assert numbered((2,), 1).tolist() == [1, 2]


def test_a_file_that_ends_within_the_rows_is_named(pace, held, tmp_path: Path):
    os.truncate(tmp_path / "b", HEAD + 20 * WIDTH)
    with pytest.raises(UnusableInput, match=f"^{tmp_path / 'b'}: it ends too early; copy it again$"):
        copied(numbered((28,), 1), held, tmp_path / "out")
