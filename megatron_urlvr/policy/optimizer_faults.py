"""Ways around faults of Megatron-Core's distributed optimizer (0.16.1) that a checkpoint would not survive.

`tests/unit/policy/test_cpu.py` fails when one of them is no longer needed.
"""

from __future__ import annotations

from typing import Any

import torch

from .optimizer import PolicyOptimizer


def prepare_for_load(optimizer: PolicyOptimizer) -> None:
    """Optimizer state must exist before it can be loaded (megatron-core 0.16.1, distrib_optimizer.py:642)."""
    for part in optimizer.parts:
        if optimizer.distributed:
            part._init_optimizer_states_with_dummy_values()


def patch_distributed_optimizer(optimizer: PolicyOptimizer) -> None:
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
    """megatron-core 0.16.1 with torch's AdamW: `step` is not among the saved tensors, and loading one fails on it. The
    fused Adams count steps in their groups, and Transformer Engine's does not save a state with anything else in it."""
    original = optimizer_class._set_main_param_and_optimizer_states
    if getattr(original, "keeps_step", False):
        return

    def with_step(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> Any:
        if not isinstance(self.optimizer, torch.optim.AdamW):
            return original(self, model_param, tensors)
        group_index, order = self.model_param_group_index_map[model_param]
        group = self.optimizer.param_groups[group_index]
        own = self.optimizer.state[group["params"][order]]
        own["step"] = torch.tensor(0.0)
        return original(self, model_param, {**tensors, "step": torch.tensor(float(group.get("step") or 0))})

    with_step.keeps_step = True  # type: ignore[attr-defined]
    optimizer_class._set_main_param_and_optimizer_states = with_step
