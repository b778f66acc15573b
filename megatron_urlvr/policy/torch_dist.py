"""Megatron's `torch_dist` checkpoints: each chunk of a tensor is a ZIP archive as of `torch.save`, the archives stand
one behind the other in files, and an index says which is where.

An archive holds the tensor's bytes as they are, in one piece: they are copied into it, and out of it, without a look.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ..exit_codes import UnusableInput
from .integrity import index_problem
from .rows import Rows

METADATA = ".metadata"


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor: its place in the whole, and that of its archive."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int
    """Bytes of the archive."""


# -- writing ----------------------------------------------------------------------------------------------------------


def write_archive(file: IO[bytes], sizes: Sequence[int], dtype: torch.dtype) -> tuple[int, int]:
    """Write a tensor's archive with a hole where its bytes belong; `file` is open for reading, too.

    Returns the hole's offset in the file, and the archive's length. No memory is taken for the tensor.
    """
    start = file.tell()
    with torch.serialization.skip_data():
        torch.save(torch.empty(tuple(sizes), dtype=dtype), file)
    file.flush()
    length = file.tell() - start
    return start + _data_offset(_stretch(file, start, length)), length


def write_index(folder: Path, tensors: dict[str, tuple[tuple[int, ...], torch.dtype, list[Chunk]]]) -> None:
    """Write what Megatron and torch read first. `tensors`: shape, type and chunks of each, by key."""
    entries: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for key, (shape, dtype, chunks) in tensors.items():
        places = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in chunks]
        entries[key] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), places)
        for chunk in chunks:
            storage[MetadataIndex(key, torch.Size(chunk.offsets))] = _StorageInfo(chunk.file, chunk.start, chunk.length)
    (folder / METADATA).write_bytes(pickle.dumps(Metadata(dict(entries), storage_data=storage)))
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backends))
    torch.save({}, folder / "common.pt")


# -- reading ----------------------------------------------------------------------------------------------------------


class Checkpoint:
    """The tensors that a checkpoint holds. UnusableInput when its index cannot be read, or would run code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if problem := index_problem(folder):
            raise UnusableInput(f"{folder}: {problem}")
        index = pickle.loads((folder / METADATA).read_bytes())
        if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
            raise UnusableInput(f"{folder / METADATA}: it is no index of a checkpoint; copy the checkpoint again")
        held = {key: e for key, e in index.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)}
        self.shapes = {key: tuple(entry.size) for key, entry in held.items()}
        self.dtypes = {key: entry.properties.dtype for key, entry in held.items()}
        sizes = {(key, chunk.offsets): chunk.sizes for key, entry in held.items() for chunk in entry.chunks}
        self._chunks: dict[str, list[Chunk]] = {key: [] for key in held}
        for at, info in index.storage_data.items():
            if (place := (at.fqn, at.offset)) in sizes:
                chunk = Chunk(tuple(at.offset), tuple(sizes[place]), info.relative_path, info.offset, info.length)
                self._chunks[at.fqn].append(chunk)

    def entry(self, key: str, at: tuple[int, ...]) -> list[Rows]:
        """The rows, numbered from 1, of one entry of a tensor: of that which lies `at` these places along its first
        axes. UnusableInput when a part of it is missing or cannot be read."""
        lead, shape = len(at), self.shapes[key][len(at) :]
        chunks = [chunk for chunk in self._chunks[key] if chunk.offsets[:lead] == at]
        if sum(torch.Size(chunk.sizes).numel() for chunk in chunks) != torch.Size(shape).numel():
            where = f" (entry {', '.join(map(str, at))})" if at else ""
            raise UnusableInput(f"{self.folder}: parts of tensor {key}{where} are missing; copy the checkpoint again")
        found, in_order = [], True
        for chunk in chunks:
            tensor, offset = self._locate(key, chunk)
            in_order &= tensor.is_contiguous() and tensor.storage_offset() == 0 and chunk.sizes[lead + 1 :] == shape[1:]
            found.append(Rows(chunk.offsets[lead] + 1, chunk.sizes[lead], self.folder / chunk.file, offset))
        return found if in_order else [Rows(1, shape[0], self._assembled(key, lead, chunks))]

    def _assembled(self, key: str, lead: int, chunks: Sequence[Chunk]) -> torch.Tensor:
        """An entry in memory, of chunks that hold parts of its rows."""
        whole = torch.empty(self.shapes[key][lead:], dtype=self.dtypes[key])
        for chunk in chunks:
            where = tuple(slice(o, o + n) for o, n in zip(chunk.offsets[lead:], chunk.sizes[lead:], strict=True))
            with open(self.folder / chunk.file, "rb") as file:
                archive = _stretch(file, chunk.start, chunk.length)
                whole[where] = torch.load(archive, weights_only=True, map_location="cpu").view(chunk.sizes[lead:])
        return whole

    def _locate(self, key: str, chunk: Chunk) -> tuple[torch.Tensor, int]:
        """A stand-in for a chunk, without its values, and the offset of its bytes in its file."""
        path = self.folder / chunk.file
        try:
            with open(path, "rb") as file:
                archive = _stretch(file, chunk.start, chunk.length)
                with torch.serialization.skip_data():
                    tensor = torch.load(archive, weights_only=True)
                archive.seek(0)
                offset = chunk.start + _data_offset(archive)
        except Exception as error:  # a damaged archive raises whatever its bytes happen to ask for
            reason = error.strerror if isinstance(error, OSError) else "its archive is damaged"
            raise UnusableInput(f"{path}: tensor {key} cannot be read ({reason}); copy the checkpoint again") from None
        found = (tensor.dtype, tuple(tensor.shape)) if isinstance(tensor, torch.Tensor) else (None, None)
        if found != (self.dtypes[key], chunk.sizes):
            raise UnusableInput(f"{path}: tensor {key} is not what the index says; copy the checkpoint again")
        return tensor, offset


def _data_offset(archive: IO[bytes]) -> int:
    """Where in an archive its tensor's bytes begin."""
    reader: Any = torch._C.PyTorchFileReader(archive)  # its type does not declare the method
    return int(reader.get_record_offset("data/0"))


def _stretch(file: IO[bytes], start: int, length: int) -> IO[bytes]:
    return cast(IO[bytes], _Stretch(file.fileno(), start, length))


class _Stretch(io.RawIOBase):
    """A stretch of an open file, as a file."""

    def __init__(self, file: int, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer).cast("B")[: max(self._length - self._at, 0)]
        done = os.preadv(self._file, [room], self._start + self._at) if room else 0
        self._at += done
        return done
