"""What a checkpoint holds: the sharded state of a policy, and each rank's random states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from safetensors.torch import load_file, save_file

from .hf.families import rope_theta, shape_of
from .model import PolicyModel, whole_name
from .optimizer_faults import patch_distributed_optimizer
from .policy import Policy

# 0.16.1's default for a distributed optimizer, fully_sharded_model_space, cannot be saved ("flattened_range").
# Memory-efficient: the first data-parallel rank gathers the optimizer's state in host memory and writes it. By default
# every rank would gather all of it on its GPU, where 4 billion parameters take 35 GB for a moment.
# Experts and the rest have an optimizer each; without a prefix an optimizer's keys are those of its parameters.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}
EXTRA_STATE = "_extra_state"
"""What layers would keep beside their parameters. Megatron's have nothing to keep, nor has Transformer Engine under
`model.fp8`, whose scales are those of the tensors at hand. But it unpickles what it finds there."""


def fingerprint(policy: Policy) -> dict[str, Any]:
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


def sizes(policy: Policy) -> list[int]:
    """The layout: tp, pp, chunks a rank, dp, cp, ep."""
    layout = policy.layout
    return [layout.tp, layout.pp, len(policy.chunks), layout.dp, layout.cp, layout.ep]


def sharded_state(policy: Policy, *, loading: bool = False) -> dict[str, Any]:
    """Weights, optimizer and moving average of this rank, in Megatron's sharded form. Collective.

    `loading`: it is to be filled from a checkpoint.
    """
    state: dict[str, Any] = _model_state(policy)
    if policy.optimizer is not None and policy.optimizer.stepped:  # before the first step there are no moments
        patch_distributed_optimizer(policy.optimizer)
        with policy.optimizer.resident():
            state["optimizer"] = policy.optimizer.megatron.sharded_state_dict(
                _model_state(policy), is_loading=loading, metadata=dict(METADATA)
            )
    if policy.ema is not None:
        state["ema"], averages = {}, policy.ema.tensors
        for chunk in policy.chunks:
            state["ema"] |= _with_tensors(chunk, averages)
    return state


def _model_state(policy: Policy) -> dict[str, Any]:
    return {f"model{i}": _parameters_state(chunk) for i, chunk in enumerate(policy.chunks)}


def _parameters_state(chunk: PolicyModel) -> dict[str, Any]:
    return {name: entry for name, entry in chunk.sharded_state_dict().items() if not name.endswith(EXTRA_STATE)}


def take_weights(chunk: PolicyModel, loaded: Mapping[str, Any]) -> None:
    """Copy a checkpoint's weights into a chunk."""
    found = chunk.load_state_dict(loaded, strict=False)
    wrong = [*found.unexpected_keys, *(name for name in found.missing_keys if not name.endswith(EXTRA_STATE))]
    assert not wrong, f"what was asked for is not what was loaded: {wrong}"


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


# -- random state -----------------------------------------------------------------------------------------------------


def _rng_file(folder: Path, rank: int) -> Path:
    return folder / f"rng_rank{rank:05d}.safetensors"


def save_rng(folder: Path, rank: int) -> None:
    """Write this rank's random states."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = {"torch": torch.get_rng_state()}
    states |= {f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file({name: state.cpu().clone() for name, state in states.items()}, _rng_file(folder, rank))


def load_rng(folder: Path, rank: int) -> None:
    """Restore the random states of this rank."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = load_file(_rng_file(folder, rank))
    torch.set_rng_state(states["torch"])
    tracked = {name.removeprefix("tracker."): s for name, s in states.items() if name.startswith("tracker.")}
    get_cuda_rng_tracker().set_states(tracked)
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
