"""Checkpoints: Megatron's distributed format for weights and optimizer, JSON for the trainer's own state.

A checkpoint is written under a temporary name, gets a manifest of its files, and is renamed last: a folder called
`step_000050` is whole or was damaged later, and damage is noticed before anything is read from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult

from ..distributed.layout import broadcast_json, gather_json
from ..environment import variables
from .contents import METADATA, fingerprint, load_rng, save_rng, sharded_state, sizes, take_weights
from .integrity import MANIFEST, Entry, verify, write_manifest
from .optimizer_faults import prepare_for_load
from .policy import Policy
from .writing import Part, plan

TRAINER = "trainer.json"
_NAME = re.compile(r"step_(\d{6,})")
_REPLACED = re.compile(r"\.step_(\d{6,})\.replaced")
_SAFE_LOADING = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": None}

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is damaged, foreign or unsafe to read."""


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step`."""
    return f"step_{step:06d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint in `folder`, newest first. One that was about to be replaced when its process
    was killed counts as long as nothing has taken its place."""
    if not folder.is_dir():
        return []
    there = [path for path in folder.iterdir() if path.is_dir()]
    found = {int(match[1]): path for path in there if (match := _REPLACED.fullmatch(path.name))}
    found |= {int(match[1]): path for path in there if (match := _NAME.fullmatch(path.name))}
    return sorted(found.items(), reverse=True)


def save(policy: Policy, folder: Path, step: int, trainer: dict[str, Any], *, keep: int) -> Path:
    """Write the checkpoint after `step` and drop all but the newest `keep`. Collective.

    Raises CheckpointError on every rank when any rank failed to write; older checkpoints are then untouched.
    """
    return Saving(policy, folder, step, trainer, keep=keep, copy=False).finish()


class Saving:
    """A checkpoint that is being written. What is not said otherwise is collective, and raises CheckpointError on every
    rank when any rank fails to write; older checkpoints are then untouched.

    Its files are written by threads; nobody takes it for a checkpoint before `finish`.
    """

    def __init__(
        self, policy: Policy, folder: Path, step: int, trainer: dict[str, Any], *, keep: int, copy: bool = True
    ) -> None:
        """Begin to write the checkpoint after `step`. `copy`: from copies in host memory, so that the policy may be
        trained on meanwhile; without, it must not change before `finish`."""
        self.step, self.path = step, folder / checkpoint_name(step)
        self._policy, self._keep = policy, keep
        self._temporary = folder / f".{checkpoint_name(step)}.writing"
        self._trainer = json.dumps(trainer)
        stepped = policy.optimizer is not None and policy.optimizer.stepped
        self._manifest = {"step": step, "stepped": stepped, "layout": sizes(policy), "model": fingerprint(policy)}
        self._part: Part | None = None
        self._on_main(self._make_folder)
        sharded: dict[str, Any] = self._everywhere(self._write_common)
        self._everywhere(lambda: self._begin(sharded, copy=copy))

    def written(self) -> bool:
        """Whether `finish` would not have to wait: all ranks have written their parts, or failed to."""
        assert self._part is not None
        return not any(gather_json(self._part.busy, self._policy.layout.control))

    def finish(self) -> Path:
        """Wait for the files, give the checkpoint its name, and drop all but the newest `keep`; returns where it is."""
        assert self._part is not None
        mine = self._everywhere(self._part.wait), self._part.files
        everyone = _gathered_on_main(mine, self._policy)
        self._on_main(lambda: self._commit(everyone))
        return self.path

    def abandon(self) -> None:
        """Write no further. Not collective; what was written stays behind under its temporary name."""
        if self._part is not None:
            self._part.stop()

    def _make_folder(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)

    def _write_common(self) -> dict[str, Any]:
        """Write what is not sharded; returns the rest."""
        state = sharded_state(self._policy) | {"content_metadata": dict(METADATA)}
        sharded, common = save_preprocess(state)
        if self._policy.layout.is_main:
            torch.save(common, self._temporary / COMMON_STATE_FNAME)
        save_rng(self._temporary, self._policy.layout.rank)
        return dict(sharded)

    def _begin(self, sharded: dict[str, Any], *, copy: bool) -> None:
        self._part = plan(sharded, self._temporary)
        if copy:
            self._part.copy()
        self._part.start()

    def _commit(self, everyone: list[tuple[list[WriteResult], dict[str, Entry]]]) -> None:
        assert self._part is not None
        self._part.write_index(self._temporary, [results for results, _ in everyone])
        (self._temporary / TRAINER).write_text(self._trainer)
        known = {name: entry for _, files in everyone for name, entry in files.items()}
        write_manifest(self._temporary, known, **self._manifest)
        replaced = self.path.with_name(f".{self.path.name}.replaced")
        if self.path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(self.path, replaced)
        os.replace(self._temporary, self.path)
        shutil.rmtree(replaced, ignore_errors=True)
        for _, old in list_checkpoints(self.path.parent)[self._keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def _on_main(self, work: Callable[[], None]) -> None:
        """Do `work` on the first rank."""
        self._everywhere(work if self._policy.layout.is_main else lambda: None)

    def _everywhere(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank; what fails on one of them is raised on all."""
        problem, done = "", None
        try:
            done = work()
        except CheckpointException as error:  # of all ranks that failed; torch makes it a BaseException
            problem = "; ".join(f"rank {rank}: {wrapped[0]}" for rank, wrapped in error.failures.items())
        except OSError as error:
            problem = str(error)
        except Exception as error:  # Megatron checks every kind of thing; all of it means "not saved"
            problem = f"{type(error).__name__}: {error}"
        if problem := _agree(self._policy, problem):
            self.abandon()
            if self._policy.layout.is_main:
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise CheckpointError(
                f"could not write checkpoint {self.path}: {problem}; checkpoints written before it are intact"
            )
        return cast(T, done)


def _gathered_on_main(value: T, policy: Policy) -> list[T]:
    """Every rank's value, in rank order, on the first rank; nothing elsewhere."""
    layout = policy.layout
    if layout.world_size == 1:
        return [value]
    found: list[Any] = [None] * layout.world_size if layout.is_main else []
    dist.gather_object(value, found if layout.is_main else None, dst=0, group=layout.control)
    return found


def load(policy: Policy, path: Path) -> dict[str, Any]:
    """Restore weights, optimizer, EMA and random state from `path`; returns the trainer's own state. Collective.

    The layout may be another than the one that saved. Random states, which nothing that trains depends on, belong to
    ranks: they are restored at the same layout alone.

    Raises CheckpointError, before anything is changed, when the checkpoint is damaged, foreign or unsafe.
    """
    layout = policy.layout
    problem = verify(path, fingerprint(policy)) if layout.is_main else ""
    if problem := _agree(policy, problem):
        raise CheckpointError(problem)
    stepped = bool(json.loads((path / MANIFEST).read_text())["stepped"])
    with contextlib.nullcontext() if policy.optimizer is None else policy.optimizer.resident():
        loaded = _load_weights_and_optimizer(policy, path, stepped=stepped)
    if policy.ema is not None:
        policy.ema.load(loaded["ema"])
    if json.loads((path / MANIFEST).read_text())["layout"] == sizes(policy):
        load_rng(path, layout.rank)
    trainer: dict[str, Any] = json.loads((path / TRAINER).read_text())
    return trainer


def _load_weights_and_optimizer(policy: Policy, path: Path, *, stepped: bool) -> dict[str, Any]:
    """Returns all that the checkpoint holds. `stepped`: moments are among it."""
    optimizer = policy.optimizer
    if optimizer is not None:
        optimizer.stepped = stepped
        if stepped:
            prepare_for_load(optimizer)
    loaded = _read(sharded_state(policy, loading=True), path)
    for i, chunk in enumerate(policy.chunks):
        take_weights(chunk, loaded[f"model{i}"])
    if optimizer is not None and stepped:
        optimizer.megatron.load_state_dict(loaded["optimizer"])
    elif optimizer is not None:
        for part in optimizer.parts:
            part.optimizer.state.clear()
            for group in part.optimizer.param_groups:  # where Transformer Engine's Adam counts its steps
                group.pop("step", None)
        optimizer.megatron.reload_model_params()
    return loaded


def newest_intact(policy: Policy, folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a sentence for each newer one that does not. Same on every rank."""
    found: list[Any] = [None, []]
    if policy.layout.is_main:
        for _, path in list_checkpoints(folder):
            problem = verify(path, fingerprint(policy))
            if not problem:
                found[0] = str(path)
                break
            found[1].append(problem)
    chosen, problems = broadcast_json(found, source=0, group=policy.layout.control)
    return (None if chosen is None else Path(chosen)), problems


def _agree(policy: Policy, problem: str) -> str:
    """The first problem of any rank, known to all."""
    if policy.layout.world_size == 1:
        return problem
    return next((p for p in gather_json(problem, policy.layout.control) if p), "")


def _read(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """`state` with what the checkpoint holds for it. CheckpointError when an object beside the tensors is more than
    data: Megatron stores some as pickles, which torch (2.13, default_planner.py) loads without restraint unless its
    environment variable forbids it."""
    with warnings.catch_warnings(), variables(_SAFE_LOADING):
        # torch 2.13 deprecates the sharded tensors that megatron-core 0.16.1 hands to it.
        warnings.filterwarnings("ignore", message="Please use DTensor", category=FutureWarning)
        try:
            return dist_checkpointing.load(state, str(path))
        except CheckpointException as error:
            problems = [wrapped[0] for wrapped in error.failures.values()]
            if any(isinstance(problem, pickle.UnpicklingError) for problem in problems):
                raise CheckpointError(f"checkpoint {path} cannot be read safely: {problems[0]}") from None
            raise
