"""The newest weights as a Hugging Face folder that servers can read: complete or not there at all."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from .buckets import Bucket

AHEAD = 2
"""Buckets that may wait for the disk; more would pile up in memory."""
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")


class Snapshots:
    """Writes one snapshot after the other in a background thread; only the newest complete one is kept."""

    def __init__(self, folder: Path, model: Path) -> None:
        """`model`: the folder whose config and tokenizer go with the weights."""
        self.folder, self.model = folder, model
        self.ready: Future[Path] | None = None
        """The newest snapshot's folder, once it is complete; None before the first."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._pending: list[Future[None]] = []
        self._map: dict[str, str] = {}
        self._bytes = 0
        self._target = folder

    def begin(self, name: str) -> None:
        """Start the snapshot `name`; the one before is complete. Raises the OSError that kept it from that."""
        if self.ready is not None:
            self.ready.result()
        self._pending, self._map, self._bytes = [], {}, 0
        self._target = self.folder / name
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        for file in self.model.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHTS):
                shutil.copyfile(file, self._partial / file.name)

    @property
    def _partial(self) -> Path:
        return self._target.with_name(self._target.name + ".partial")

    def add(self, bucket: Bucket) -> None:
        """Write a bucket behind the scenes. Raises OSError of an earlier one that failed."""
        file = f"model-{len(self._pending):05d}.safetensors"
        self._map |= {entry.name: file for entry in bucket.entries}
        self._bytes += bucket.size
        # Copied where need be: it may be written when the policy has moved on.
        self._pending.append(self._writer.submit(bucket.copied().write, self._partial / file))
        if len(self._pending) > AHEAD:
            self._pending[-1 - AHEAD].result()

    def commit(self) -> Future[Path]:
        """Put the snapshot in place once the disk has it, and remove the one before. The future gives its folder."""
        self.ready = self._writer.submit(self._commit, self._target, self._partial, list(self._pending))
        return self.ready

    def _commit(self, target: Path, partial: Path, writes: list[Future[None]]) -> Path:
        for write in writes:
            write.result()
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for other in self.folder.iterdir():
            if other != target:
                shutil.rmtree(other, ignore_errors=True)
        return target.resolve()

    def close(self) -> None:
        """Remove the snapshots: checkpoints are what lasts."""
        self._writer.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)
