"""Writing the files of a checkpoint: planned by all ranks together, written by each in threads of its own.

    sharded state ─► plan (collective) ─► Part ─► [copy] ─► threads ─► results of all ranks ─► index (rank 0)

Megatron's own saving (0.16.1) forks processes for the files. They would hold the connections of a trainer that was
killed, and write on; a thread ends with its process. Nor is its order of collectives one that a full disk leaves
intact: the first rank, failing to write the index, raises alone, and the others wait for it.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from .integrity import Entry, entry_of

BACKEND = ("torch_dist", 1)

# For the results of its processes Megatron starts a manager process (0.16.1), which costs seconds, and which lives on
# when the trainer is killed. There are no such processes here, and nothing is put into the queue.
filesystem_async._get_write_results_queue = queue.Queue


class Part:
    """This rank's part of a checkpoint."""

    def __init__(self, writer: FileSystemWriterAsync, index: Metadata | None) -> None:
        """`index`: what the checkpoint's index will hold, on the first rank."""
        self._writer, self._index = writer, index
        self._stopped = threading.Event()
        self._problems: list[str] = []
        self._results: dict[str, list[WriteResult]] = {}
        self._threads = [
            threading.Thread(target=self._write, args=(bucket,), name="checkpoint", daemon=True)
            for bucket in writer.write_buckets
        ]
        self.files: dict[str, Entry] = {}
        """The files written, for the manifest."""

    def copy(self) -> None:
        """Take copies, in host memory, of all that is to be written: the policy may change from now on."""
        for _, _, (_, tensors) in self._writer.write_buckets:
            for i, (item, tensor) in enumerate(tensors):
                tensors[i] = item, tensor.to("cpu", copy=True)

    def start(self) -> None:
        """Begin to write."""
        for thread in self._threads:
            thread.start()

    @property
    def busy(self) -> bool:
        """Whether anything is still being written."""
        return any(thread.is_alive() for thread in self._threads)

    def wait(self) -> list[WriteResult]:
        """Where everything lies, once it is written. OSError, or another error, when it could not be."""
        for thread in self._threads:
            thread.join()
        if self._problems:
            raise OSError(self._problems[0])
        return [result for name in sorted(self._results) for result in self._results[name]]

    def stop(self) -> None:
        """Write no further than to the end of the tensors at hand."""
        self._stopped.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def write_index(self, folder: Path, everyone: Sequence[list[WriteResult]]) -> None:
        """Write what is read first: which chunk of which tensor lies where. `everyone`: the results of all ranks."""
        assert self._index is not None, "the first rank holds the index"
        self._writer.finish(self._index, list(everyone))
        save_config(CheckpointingConfig(*BACKEND), str(folder))

    def _write(self, bucket: WriteBucket) -> None:
        path, name, (objects, tensors) = bucket
        results = []
        try:
            with open(path, "wb") as file:
                for item, data in _drained(objects, tensors):
                    if self._stopped.is_set():
                        return
                    form = SerializationFormat.TORCH_SAVE
                    results.append(_write_item(self._writer.transforms, file, data, item, name, form))
                    del data
                file.flush()
                os.fsync(file.fileno())
            self.files[name] = entry_of(Path(path))
            self._results[name] = results
        except Exception as error:  # whatever it was, the checkpoint is not written, and all ranks must hear of it
            # A disk that is full in the middle of an archive makes torch fail again when it closes that.
            disk = next((each for each in (error, error.__context__) if isinstance(each, OSError)), None)
            self._problems.append(f"{type(error).__name__}: {error}" if disk is None else str(disk))


def _drained(
    objects: list[tuple[WriteItem, Any]], tensors: list[tuple[WriteItem, torch.Tensor]]
) -> Iterator[tuple[WriteItem, Any]]:
    """What is to be written, each given up when the next one is asked for: its memory is free again."""
    yield from objects
    tensors.reverse()
    while tensors:
        item, tensor = tensors.pop()
        yield item, tensor.to("cpu")
        del tensor


class _Planner(TorchDistSaveShardedStrategy):
    """Megatron's planning of a save, which returns what it would go on to do."""

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, planned: Any) -> Part:
        return Part(writer, planned[1])


def plan(sharded: dict[str, Any], folder: Path) -> Part:
    """Share a sharded state, without what `save_preprocess` takes out, among the ranks. Collective."""
    return _Planner(*BACKEND).async_save(sharded, folder)
