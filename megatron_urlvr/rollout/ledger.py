"""The ledger: finished groups of training steps, on the disk before the trainer gets them, so that none that a server
has finished is generated again after a kill.

One file holds the groups that one replica finished for one step, in the order they finished:

    [4 bytes "UGRP"][length, CRC-32: uint32 little-endian][JSON of the group, zstd-compressed] ...

Records are only ever appended, each made durable before the next. A record that was torn by a crash ends its file: what
it held counts as never finished. What was consumed is committed by checkpoints: a run goes on after its checkpoint's
step and takes the groups of later steps from here.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import zstandard

from ..run.folder import step_name, sync_folder
from ..types import Group
from .records import group_from_record, group_to_record

HEAD = struct.Struct("<4sII")
MAGIC = b"UGRP"
OPEN_FILES = 16
NAME = re.compile(r"(step_\d+)\.r(\d+)\.groups")


class Ledger:
    """The ledger of one run, as one replica writes it; every replica's records are read. Used from one thread at a
    time, except that records may be read while another step's are written."""

    def __init__(self, folder: Path, replica: int) -> None:
        self.folder, self.replica = folder, replica
        self._files: dict[int, io.FileIO] = {}

    def append(self, step: int, group: Group) -> None:
        """Add a finished group; it is durable when this returns. OSError leaves the file as it was."""
        file = self._opened(step)
        payload = zstandard.compress(json.dumps(group_to_record(group)).encode(), 3)
        before = file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(HEAD.pack(MAGIC, len(payload), zlib.crc32(payload)) + payload)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise

    def _opened(self, step: int) -> io.FileIO:
        """The file of `step`, cut back to its last whole record."""
        if step in self._files:
            return self._files[step]
        while len(self._files) >= OPEN_FILES:
            self._files.pop(min(self._files)).close()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{step_name(step)}.r{self.replica}.groups"
        whole = _whole(path.read_bytes()) if path.exists() else 0
        file = self._files[step] = io.FileIO(path, "a")
        file.truncate(whole)
        sync_folder(self.folder)
        return file

    def groups(self, step: int) -> dict[str, Group]:
        """The finished groups of `step`, of all replicas, by prompt id."""
        found: dict[str, Group] = {}
        for path in sorted(self.folder.glob(f"{step_name(step)}.r*.groups")):
            for payload in _payloads(path.read_bytes(), path):
                group = group_from_record(json.loads(zstandard.decompress(payload)))
                found[group.prompt.id] = group
        return found

    def steps(self) -> list[int]:
        """Steps with a finished group or more, in order."""
        return sorted({step for step, path in _files(self.folder) if path.stat().st_size})

    def forget(self, step: int) -> None:
        """Remove what is known of steps up to `step`: no checkpoint before it is left to resume from."""
        self._remove([found for found, _ in _files(self.folder) if found <= step])

    def discard(self, step: int) -> None:
        """Remove what is known of `step`: its groups shall be sampled anew."""
        self._remove([step])

    def _remove(self, steps: Sequence[int]) -> None:
        for step, path in _files(self.folder):
            if step in steps:
                path.unlink(missing_ok=True)
        for step in steps:
            if (file := self._files.pop(step, None)) is not None:
                file.close()

    def close(self) -> None:
        """Close the files being written."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def _files(folder: Path) -> list[tuple[int, Path]]:
    """`(step, path)` of every file of a ledger."""
    found = folder.iterdir() if folder.is_dir() else ()
    return [(int(m[1].removeprefix("step_")), path) for path in found if (m := NAME.fullmatch(path.name))]


def _payloads(content: bytes, path: Path | None = None) -> Iterator[bytes]:
    """The payloads of all whole records up to the first that is torn or damaged."""
    at = 0
    while at < len(content):
        head = content[at : at + HEAD.size]
        if len(head) < HEAD.size:
            return
        magic, length, checksum = HEAD.unpack(head)
        payload = content[at + HEAD.size : at + HEAD.size + length]
        if magic != MAGIC or len(payload) < length or zlib.crc32(payload) != checksum:
            if path is not None and at + HEAD.size + length < len(content):
                print(
                    f"{path} is damaged at byte {at}: the groups from there on are generated again",
                    file=sys.stderr,
                    flush=True,
                )
            return
        at += HEAD.size + length
        yield payload


def _whole(content: bytes) -> int:
    """Bytes of the whole records at the beginning of `content`."""
    return sum(HEAD.size + len(payload) for payload in _payloads(content))
