"""Checkpoints: Megatron's distributed format for weights and optimizer, JSON for the trainer's own state.

A checkpoint is written under a temporary name, gets a manifest of its files, and is renamed last: a folder called
`step_000050` is whole or was damaged later, and damage is noticed before anything is read from it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import queue
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from ..distributed.layout import broadcast_json, gather_json
from .hf.families import rope_theta, shape_of
from .model import PolicyModel, whole_name
from .optimizer import PolicyOptimizer
from .policy import Policy

FORMAT = 2
MANIFEST = "manifest.json"
TRAINER = "trainer.json"
HASHED_BELOW = 64 << 20
"""Files up to this size are verified by SHA-256, larger ones by size."""
_NAME = re.compile(r"step_(\d{6,})")

# What torch's checkpoint index is made of. It is a pickle, which may name any function and call it: one that names
# anything else is refused, and nothing in it is called to find out.
_INDEX_NAMES = {
    "builtins": {"set", "frozenset"},
    "collections": {"OrderedDict"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}

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
            dist_checkpointing.save(_sharded_state(policy), str(temporary), content_metadata=_metadata(policy))
            _save_rng(temporary, layout.rank)
        except CheckpointException as error:  # of all ranks that failed; torch makes it a BaseException
            problem = "; ".join(f"rank {rank}: {wrapped[0]}" for rank, wrapped in error.failures.items())
        except Exception as error:  # the writer's processes report every kind of error; all of them mean "not saved"
            problem = f"{type(error).__name__}: {error}"
    problem = _agree(policy, problem)
    if not problem and layout.is_main:
        try:
            (temporary / TRAINER).write_text(json.dumps(trainer))
            _write_manifest(temporary, policy, step)
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
    problem = verify(path, _fingerprint(policy)) if layout.is_main else ""
    if problem := _agree(policy, problem):
        raise CheckpointError(problem)
    stepped = bool(json.loads((path / MANIFEST).read_text())["stepped"])
    if policy.optimizer is not None:
        policy.optimizer.stepped = stepped
        if stepped:
            _prepare_for_load(policy.optimizer)
    state = _sharded_state(policy, loading=True)
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
    if json.loads((path / MANIFEST).read_text())["layout"] == _sizes(policy):
        _load_rng(path, layout.rank)
    trainer: dict[str, Any] = json.loads((path / TRAINER).read_text())
    return trainer


def newest_intact(policy: Policy, folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a sentence for each newer one that does not. Same on every rank."""
    found: list[Any] = [None, []]
    if policy.layout.is_main:
        for _, path in list_checkpoints(folder):
            problem = verify(path, _fingerprint(policy))
            if not problem:
                found[0] = str(path)
                break
            found[1].append(problem)
    chosen, problems = broadcast_json(found, source=0, group=policy.layout.control)
    return (None if chosen is None else Path(chosen)), problems


# -- integrity --------------------------------------------------------------------------------------------------------


def verify(path: Path, fingerprint: dict[str, Any]) -> str:
    """A sentence that says what is wrong with a checkpoint; empty when it is whole and of this model."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        written, files, model, *_ = (manifest[key] for key in ("format", "files", "model", "stepped", "layout"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"checkpoint {path} is refused: it has no readable {MANIFEST}, so it is not one of this program's"
    if written != FORMAT:
        return f"checkpoint {path} is refused: format {written!r}, this program reads {FORMAT}"
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            return f"checkpoint {path} is refused: {name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"checkpoint {path} is refused: {name} holds {file.stat().st_size} bytes of {entry['bytes']}"
        if "sha256" in entry and _sha256(file) != entry["sha256"]:
            return f"checkpoint {path} is refused: the contents of {name} have changed since it was written"
    if model != fingerprint:
        differing = sorted(k for k in {*model, *fingerprint} if model.get(k) != fingerprint.get(k))
        return f"checkpoint {path} is refused: it belongs to another model ({', '.join(differing)} differ)"
    problem = index_problem(path)
    return problem and f"checkpoint {path} is refused: {problem}"


def index_problem(path: Path) -> str:
    """What forbids reading a checkpoint's index, which is a pickle; empty when it names nothing that runs code."""
    try:
        unsafe = _unsafe_names(path / ".metadata")
    except Exception as error:  # a broken pickle raises whatever its bytes happen to ask for
        return f"its index cannot be read ({type(error).__name__}: {error})"
    return f"its index names {', '.join(unsafe)}, which no checkpoint needs" if unsafe else ""


def _unsafe_names(index: Path) -> list[str]:
    """What torch's pickled checkpoint index names that no index needs; nothing in it is called to find out."""
    names = _Names(io.BytesIO(index.read_bytes()))
    names.load()
    return sorted(f"{module}.{name}" for module, name in names.found if not _belongs_in_index(module, name))


def _belongs_in_index(module: str, name: str) -> bool:
    is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
    return is_dtype or name in _INDEX_NAMES.get(module, ())


class _Names(pickle.Unpickler):
    """Reads a pickle with an inert object in place of everything that it names, and keeps the names."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.found: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.found.add((module, name))
        return _Inert


class _Inert:
    """Can be made, called, filled and used as a key, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, item: Any) -> None: ...
    def extend(self, items: Any) -> None: ...
    def add(self, item: Any) -> None: ...


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write_manifest(folder: Path, policy: Policy, step: int) -> None:
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        entry: dict[str, Any] = {"bytes": file.stat().st_size}
        if entry["bytes"] <= HASHED_BELOW:
            entry["sha256"] = _sha256(file)
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
        files[str(file.relative_to(folder))] = entry
    stepped = policy.optimizer is not None and policy.optimizer.stepped
    manifest = {"format": FORMAT, "step": step, "stepped": stepped, "layout": _sizes(policy)}
    manifest |= {"model": _fingerprint(policy), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _fingerprint(policy: Policy) -> dict[str, Any]:
    """What a checkpoint and the policy that loads it must have in common."""
    keys = ("architectures", "num_hidden_layers", "tie_word_embeddings", "rms_norm_eps")
    return {
        **{key: policy.hf.get(key) for key in keys},
        **vars(shape_of(policy.hf, tp=1)),
        "rope_theta": rope_theta(policy.hf),
        "dtype": str(policy.dtype),
        "optimizer": None if policy.optimizer is None else ("distributed" if policy.optimizer.distributed else "plain"),
        "ema": policy.ema is not None,
    }


def _sizes(policy: Policy) -> list[int]:
    """The layout: tp, pp, chunks a rank, dp."""
    layout = policy.layout
    return [layout.tp, layout.pp, len(policy.chunks), layout.dp]


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


# -- what is in it ----------------------------------------------------------------------------------------------------


def _metadata(policy: Policy) -> dict[str, Any]:
    # 0.16.1's default for a distributed optimizer, fully_sharded_model_space, cannot be saved ("flattened_range").
    return {"distrib_optim_sharding_type": "fully_reshardable"}


def _sharded_state(policy: Policy, *, loading: bool = False) -> dict[str, Any]:
    state: dict[str, Any] = _model_state(policy)
    if policy.optimizer is not None and policy.optimizer.stepped:  # before the first step there are no moments
        _patch_distributed_optimizer(policy.optimizer)
        state["optimizer"] = policy.optimizer.megatron.sharded_state_dict(
            _model_state(policy), is_loading=loading, metadata=_metadata(policy)
        )
    if policy.ema is not None:
        state["ema"] = {}
        for chunk in policy.chunks:
            state["ema"] |= _with_tensors(chunk, policy.ema.tensors)
    return state


def _model_state(policy: Policy) -> dict[str, Any]:
    return {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(policy.chunks)}


def _with_tensors(chunk: PolicyModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A chunk's sharded state that stores `tensors` (by name in the whole model) under keys of its own."""
    out = {}
    for local, entry in chunk.sharded_state_dict().items():
        name = whole_name(chunk, local)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and name in tensors:
            entry.key = f"ema.{entry.key}"
            entry.data = tensors[name]
            if isinstance(entry, ShardedTensor):
                entry.dtype = torch.float32
            out[name] = entry
    return out


def _prepare_for_load(optimizer: PolicyOptimizer) -> None:
    """Optimizer state must exist before it can be loaded (megatron-core 0.16.1, distrib_optimizer.py:642)."""
    for part in optimizer.parts:
        if optimizer.distributed:
            part._init_optimizer_states_with_dummy_values()


def _patch_distributed_optimizer(optimizer: PolicyOptimizer) -> None:
    """Ways around two faults of megatron-core 0.16.1's distributed optimizer, taken once a process."""
    for part in optimizer.parts if optimizer.distributed else ():
        _patch_step_load(type(part))
        _patch_padding(type(part))


def _patch_padding(optimizer_class: Any) -> None:
    """The states gathered for a checkpoint leave out the padding behind each bucket, and are then cut by positions that
    count it: behind the first bucket (a pipeline's last stage has two when embeddings are tied) every parameter would
    get a part of its neighbour's state. Put the padding in."""
    original = optimizer_class.get_parameter_state_dp_zero
    if getattr(original, "keeps_padding", False):
        return

    def with_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = original(self, *args, **kwargs)
        for i, buffer in enumerate(self.buffers) if state is not None else ():
            for tensors in state[i].values():
                for name in ("param", "exp_avg", "exp_avg_sq"):
                    if name in tensors:
                        tensors[name] = _padded(tensors[name], buffer)
        return state

    with_padding.keeps_padding = True  # type: ignore[attr-defined]
    optimizer_class.get_parameter_state_dp_zero = with_padding


def _padded(coalesced: torch.Tensor, buffer: Any) -> torch.Tensor:
    """`coalesced`: a buffer's entries, bucket after bucket without padding -> the same at the buffer's own places."""
    placed = coalesced.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        placed[bucket.offset : bucket.offset + bucket.numel_unpadded] = coalesced[start : start + bucket.numel_unpadded]
        start += bucket.numel_unpadded
    return placed


def _patch_step_load(optimizer_class: Any) -> None:
    """megatron-core 0.16.1 with torch's AdamW: `step` is not among the saved tensors, and loading one fails on it."""
    original = optimizer_class._set_main_param_and_optimizer_states
    if getattr(original, "keeps_step", False):
        return

    def with_step(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> Any:
        group_index, order = self.model_param_group_index_map[model_param]
        group = self.optimizer.param_groups[group_index]
        own = self.optimizer.state[group["params"][order]]
        own["step"] = torch.tensor(0.0)
        return original(self, model_param, {**tensors, "step": torch.tensor(float(group.get("step") or 0))})

    with_step.keeps_step = True  # type: ignore[attr-defined]
    optimizer_class._set_main_param_and_optimizer_states = with_step


# -- random state -----------------------------------------------------------------------------------------------------


def _rng_file(folder: Path, rank: int) -> Path:
    return folder / f"rng_rank{rank:05d}.safetensors"


def _save_rng(folder: Path, rank: int) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = {"torch": torch.get_rng_state()}
    states |= {f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file({name: state.cpu().clone() for name, state in states.items()}, _rng_file(folder, rank))


def _load_rng(folder: Path, rank: int) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = load_file(_rng_file(folder, rank))
    torch.set_rng_state(states["torch"])
    tracked = {name.removeprefix("tracker."): s for name, s in states.items() if name.startswith("tracker.")}
    get_cuda_rng_tracker().set_states(tracked)
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def barrier(policy: Policy) -> None:
    """Wait for all ranks."""
    if policy.layout.world_size > 1:
        dist.barrier(group=policy.layout.control)
