"""One rank of a large layout in one process: Megatron's groups over a fake backend, tensors on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ...config.parallel import ParallelSection
from ...distributed.layout import Layout, form_groups
from ...policy import model as policy_model

META = torch.device("meta")


@contextmanager
def pretended_rank(parallel: ParallelSection, *, rank: int, world_size: int) -> Iterator[Layout]:
    """Be rank `rank` of `world_size` for the time of a block, in which tensors have shapes and no contents.

    Collectives return at once and change nothing. RuntimeError inside a real process group.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core import tensor_parallel
    from megatron.core.distributed import param_and_grad_buffer

    if dist.is_initialized():
        raise RuntimeError("a plan cannot be made inside a process group")
    real_new_group, real_type = dist.new_group, torch.Tensor.type
    real_frequencies = policy_model.rope_frequencies

    def new_group(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "gloo":  # Megatron asks for gloo groups too: those would open connections
            kwargs["backend"] = "fake"
        return real_new_group(*args, **kwargs)

    def frequencies(*args: Any) -> torch.Tensor:
        with torch.device("cpu"):  # rotary frequencies are few, and made on the CPU by Megatron too
            return real_frequencies(*args)

    def cuda_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = real_type(tensor, *args, **kwargs)
        return name if args or kwargs else str(name).replace("torch.meta.", "torch.cuda.")

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(dist, "new_group", new_group))
            form_groups(parallel)
            tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
            # What Megatron allocates on "the current device" goes to the meta device, and passes for CUDA's.
            seen_by_megatron = param_and_grad_buffer.torch
            stack.enter_context(mock.patch.object(seen_by_megatron.cuda, "current_device", return_value=META))
            stack.enter_context(mock.patch.object(torch.Tensor, "type", cuda_type))
            # Transformer Engine allocates on the GPU itself; Megatron's own layers hold the same elements.
            stack.enter_context(mock.patch.object(policy_model, "has_transformer_engine", return_value=False))
            stack.enter_context(mock.patch.object(policy_model, "rope_frequencies", frequencies))
            stack.enter_context(META)
            yield _layout(mpu, rank, world_size)
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


def _layout(mpu: Any, rank: int, world_size: int) -> Layout:
    everyone = dist.group.WORLD
    return Layout(
        device=META,
        world_size=world_size,
        rank=rank,
        tp=mpu.get_tensor_model_parallel_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp=mpu.get_pipeline_model_parallel_world_size(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        cp=mpu.get_context_parallel_world_size(),
        cp_rank=mpu.get_context_parallel_rank(),
        ep=mpu.get_expert_model_parallel_world_size(),
        ep_rank=mpu.get_expert_model_parallel_rank(),
        dp=mpu.get_data_parallel_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        control=everyone,
        replica=everyone,
        replica_ranks=(),
        leaders=(),
        pipeline=mpu.get_pipeline_model_parallel_group(),
        pipeline_ranks=(),
        tensor=mpu.get_tensor_model_parallel_group(),
        context=mpu.get_context_parallel_group(),
        experts=mpu.get_expert_model_parallel_group(),
        peers=everyone,
    )
