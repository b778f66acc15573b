"""Rows of tensors, copied from file to file: a conversion moves bytes, and computes with none.

Fusing and splitting parameters puts rows (entries of the first axis) into another order. Which, the rule itself says:
it is applied to row numbers, and every stretch of numbers that follow each other is one copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

import torch

from ..exit_codes import UnusableInput

PADDING = 0
"""The number of a row of zeros. Others are numbered from 1."""
BUFFER = 1 << 20
"""Bytes that are read and written at once. `os.copy_file_range` takes 1.5 times as long where a place in the source and
one in the target differ within a page, as those of tensors do (Linux 6.18, ext4)."""


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a tensor, and where their bytes lie, one row behind the other."""

    first: int
    count: int
    source: Path | torch.Tensor
    at: int = 0
    """Offset in the file, bytes."""


def numbered(shape: Sequence[int], first: int) -> torch.Tensor:
    """A stand-in for a tensor of `shape`, as wide as one entry, whose rows hold their numbers, from `first` on."""
    return torch.arange(first, first + shape[0]).view(-1, *(1 for _ in shape[1:]))


def runs(numbers: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """(place, first, count) of every stretch of rows whose numbers follow each other. Padding is left out."""
    flat = numbers.flatten()
    ends = (flat.diff() != 1) | (flat[:-1] == PADDING)
    borders = [0, *(ends.nonzero().flatten() + 1).tolist(), len(flat)]
    for start, stop in pairwise(borders):
        if (first := int(flat[start])) != PADDING:
            yield start, first, stop - start


class Copier:
    """Copies rows into one file; keeps the file open that it read last. A context manager."""

    def __init__(self, target: IO[bytes]) -> None:
        self._target = target.fileno()
        self._path: Path | None = None
        self._source = -1
        self._buffer = memoryview(bytearray(BUFFER))

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, *_: object) -> None:
        if self._source >= 0:
            os.close(self._source)

    def copy(self, numbers: torch.Tensor, held: Sequence[Rows], row_bytes: int, at: int) -> None:
        """Write the rows of `numbers`, all of which are `held`, from offset `at` on. UnusableInput names a file that
        ends too early."""
        for place, first, count in runs(numbers):
            for rows in held:
                start, stop = max(first, rows.first), min(first + count, rows.first + rows.count)
                if start < stop:
                    offset = (start - rows.first) * row_bytes
                    self._copy(rows, offset, (stop - start) * row_bytes, at + (place + start - first) * row_bytes)

    def _copy(self, rows: Rows, offset: int, count: int, at: int) -> None:
        if isinstance(rows.source, torch.Tensor):
            data = rows.source.contiguous().view(-1).view(torch.uint8).numpy().data
            write_all(self._target, data[offset : offset + count], at)
            return
        if rows.source != self._path:
            if self._source >= 0:
                os.close(self._source)
            self._path, self._source = rows.source, os.open(rows.source, os.O_RDONLY)
        source_at = rows.at + offset
        while count:
            done = os.preadv(self._source, [self._buffer[:count]], source_at)
            if not done:
                raise UnusableInput(f"{rows.source}: it ends too early; copy it again")
            write_all(self._target, self._buffer[:done], at)
            source_at, at, count = source_at + done, at + done, count - done


def write_all(target: int, data: memoryview, at: int) -> None:
    """Write all of `data` at an offset of an open file."""
    while data:
        done = os.pwrite(target, data, at)
        data, at = data[done:], at + done
