"""Megatron's DDP wrapper and optimizer for the policy, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from ..config.optim import OptimSection
from .model import PolicyModel
from .parking import Parking


class NonFiniteError(RuntimeError):
    """Loss or gradient is NaN or infinite; the optimizer has not been stepped."""


def learning_rate(section: OptimSection, update: int, *, steps: int, per_step: int = 1) -> float:
    """Learning rate of optimizer step `update` (from 0) in a run of `steps` steps of `per_step` optimizer steps each:
    linear warm-up, then the schedule down to `min_lr`, which the first one after the horizon has (as in Megatron-LM:
    none before it is wasted at a floor of 0)."""
    if update < section.warmup_steps:
        return section.lr * (update + 1) / section.warmup_steps
    horizon = section.horizon(steps)
    if horizon is None:
        return section.lr
    span = max(horizon * per_step - section.warmup_steps, 1)
    done = min((update - section.warmup_steps) / span, 1.0)
    left = 1 - done if section.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return section.min_lr + (section.lr - section.min_lr) * left


def wrap(model: PolicyModel, *, distributed: bool, overlap: bool = False) -> DistributedDataParallel:
    """Megatron's DDP: contiguous float32 gradient buffers, summed (not averaged) over data-parallel ranks, with
    `overlap` in several buckets as they get ready.

    Gathering parameters is never put off to the next forward (`overlap_param_gather`): what comes after a step is the
    export of all weights.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, use_distributed_optimizer=distributed
    )
    return DistributedDataParallel(model.config, config, model)


class PolicyOptimizer:
    """AdamW over Megatron's masters, stepped only with finite gradients."""

    def __init__(self, section: OptimSection, chunks: Sequence[DistributedDataParallel], *, distributed: bool) -> None:
        params_dtype = next(chunks[0].parameters()).dtype
        self.clip = section.clip_grad
        self.weight_decay = section.weight_decay
        self.distributed = distributed
        self.offload = section.offload
        self._parking, self._asked_for = Parking(), 0
        self.stepped = False
        """Moments exist: at least one step was taken, here or before the checkpoint that was loaded."""
        self.megatron: Any = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=section.lr,
                weight_decay=section.weight_decay,
                adam_beta1=section.beta1,
                adam_beta2=section.beta2,
                adam_eps=section.eps,
                clip_grad=section.clip_grad,
                params_dtype=params_dtype,
                bf16=params_dtype == torch.bfloat16,
                use_distributed_optimizer=distributed,
            ),
            list(chunks),
        )

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Masters and moments are on the device for the time of a block, in which alone they may be looked at where
        `optim.offload` keeps them in host memory otherwise."""
        self._parking.bring_back()
        self._asked_for += 1
        try:
            yield
        finally:
            self._asked_for -= 1
            self.park()

    def park(self) -> None:
        """Send masters and moments to host memory, where `optim.offload` wants them there and nobody looks at them."""
        if self.offload and not self._asked_for:
            self._parking.park(self._offloaded())

    def _offloaded(self) -> Iterator[torch.Tensor]:
        """Masters and moments; a float32 parameter is its own master, and stays."""
        for part in self.parts:
            yield from (master for group in part.shard_fp32_from_float16_groups for master in group)
            for state in part.optimizer.state.values():
                yield from (each for each in state.values() if isinstance(each, torch.Tensor) and each.dim() > 0)

    def zero_grad(self) -> None:
        """Drop gradients of the last step."""
        self.megatron.zero_grad()

    def step(self, lr: float) -> float:
        """Clip by the global norm and step at `lr`; returns the norm before clipping. To be called where masters and
        moments are `resident`.

        Raises NonFiniteError, with weights and moments untouched, when the norm is not finite.
        """
        self.megatron.prepare_grads()
        norm = float(self.megatron.get_grad_norm())
        if not math.isfinite(norm):
            raise NonFiniteError(f"the gradient norm is {norm}")
        for part in self.parts:
            parameters = part.get_parameters()
            if self.clip > 0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=self.clip, total_norm=norm)
        for group in self.megatron.param_groups:
            # Megatron leaves both to its scheduler; biases and norms are in a group with wd_mult 0.
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.weight_decay * group.get("wd_mult", 1.0)
        self.megatron.step_with_ready_grads()
        self.stepped = True
        return norm

    @property
    def parts(self) -> list[Any]:
        """The chained Megatron optimizers."""
        return list(getattr(self.megatron, "chained_optimizers", [self.megatron]))
