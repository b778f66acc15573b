"""Checkpoints: Megatron's distributed format for weights and optimizer, JSON for the trainer's own state.

A checkpoint is written under a temporary name, gets a manifest of its files, and is renamed last: a folder called
`step_000050` is whole or was damaged later, and damage is noticed before anything is read from it.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from ..distributed.layout import broadcast_json, gather_json
from .contents import METADATA, fingerprint, load_rng, save_rng, sharded_state, sizes
from .integrity import MANIFEST, verify, write_manifest
from .optimizer_faults import prepare_for_load
from .policy import Policy

TRAINER = "trainer.json"
_NAME = re.compile(r"step_(\d{6,})")

# Saving waits for the files, so that the writer's results can be handed over within this process. For that Megatron
# starts a manager process (0.16.1), which costs seconds, and which lives on when the trainer is killed.
filesystem_async._get_write_results_queue = queue.Queue


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is damaged, foreign or unsafe to read."""


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step`."""
    return f"step_{step:06d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint in `folder`, newest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return sorted(found, reverse=True)


def save(policy: Policy, folder: Path, step: int, trainer: dict[str, Any], *, keep: int) -> Path:
    """Write the checkpoint after `step` and drop all but the newest `keep`. Collective.

    Raises CheckpointError on every rank when any rank failed to write; older checkpoints are then untouched.
    """
    layout = policy.layout
    final, temporary = folder / checkpoint_name(step), folder / f".{checkpoint_name(step)}.writing"
    problem = ""
    if layout.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            problem = str(error)
    problem = _agree(policy, problem)
    if not problem:
        try:
            dist_checkpointing.save(sharded_state(policy), str(temporary), content_metadata=dict(METADATA))
            save_rng(temporary, layout.rank)
        except CheckpointException as error:  # of all ranks that failed; torch makes it a BaseException
            problem = "; ".join(f"rank {rank}: {wrapped[0]}" for rank, wrapped in error.failures.items())
        except Exception as error:  # the writer's processes report every kind of error; all of them mean "not saved"
            problem = f"{type(error).__name__}: {error}"
    problem = _agree(policy, problem)
    if not problem and layout.is_main:
        try:
            (temporary / TRAINER).write_text(json.dumps(trainer))
            _describe(temporary, policy, step)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            for _, old in list_checkpoints(folder)[keep:]:
                shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            problem = str(error)
    problem = _agree(policy, problem)
    if problem:
        if layout.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"could not write checkpoint {final}: {problem}; checkpoints written before it are intact"
        )
    return final


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
    if policy.optimizer is not None:
        policy.optimizer.stepped = stepped
        if stepped:
            prepare_for_load(policy.optimizer)
    state = sharded_state(policy, loading=True)
    loaded = _read(state, path)
    for i, chunk in enumerate(policy.chunks):
        chunk.load_state_dict(loaded[f"model{i}"])
    if policy.optimizer is not None and stepped:
        policy.optimizer.megatron.load_state_dict(loaded["optimizer"])
    elif policy.optimizer is not None:
        for part in policy.optimizer.parts:
            part.optimizer.state.clear()
        policy.optimizer.megatron.reload_model_params()
    if policy.ema is not None:
        for name, tensor in loaded["ema"].items():
            policy.ema.tensors[name].copy_(tensor)
    if json.loads((path / MANIFEST).read_text())["layout"] == sizes(policy):
        load_rng(path, layout.rank)
    trainer: dict[str, Any] = json.loads((path / TRAINER).read_text())
    return trainer


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


def _describe(folder: Path, policy: Policy, step: int) -> None:
    stepped = policy.optimizer is not None and policy.optimizer.stepped
    write_manifest(folder, step=step, stepped=stepped, layout=sizes(policy), model=fingerprint(policy))


def _agree(policy: Policy, problem: str) -> str:
    """The first problem of any rank, known to all."""
    if policy.layout.world_size == 1:
        return problem
    return next((p for p in gather_json(problem, policy.layout.control) if p), "")


def _read(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """`state` with what the checkpoint holds for it. CheckpointError when an object beside the tensors is more than
    data: Megatron stores some as pickles, which torch (2.13, default_planner.py) loads without restraint unless its
    environment variable forbids it."""
    with (
        warnings.catch_warnings(),
        _environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=None),
    ):
        # torch 2.13 deprecates the sharded tensors that megatron-core 0.16.1 hands to it.
        warnings.filterwarnings("ignore", message="Please use DTensor", category=FutureWarning)
        try:
            return dist_checkpointing.load(state, str(path))
        except CheckpointException as error:
            problems = [wrapped[0] for wrapped in error.failures.values()]
            if any(isinstance(problem, pickle.UnpicklingError) for problem in problems):
                raise CheckpointError(f"checkpoint {path} cannot be read safely: {problems[0]}") from None
            raise


@contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Environment variables set (None: unset) for a while."""
    before = {name: os.environ.pop(name, None) for name in values}
    os.environ.update({name: value for name, value in values.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
