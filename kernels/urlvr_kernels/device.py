"""What depends on where a tensor is: on CPUs values are looked at and half precision is widened; elsewhere neither."""

from __future__ import annotations

import torch


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether values can be looked at without waiting for a device. Whatever is not a CPU is treated as a GPU is."""
    return tensor.device.type == "cpu"


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of states, statistics and sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gemm_dtype(tensor: torch.Tensor) -> torch.dtype:
    """GPUs multiply half precision natively; on CPUs the factors are widened first."""
    return wide_dtype(tensor.dtype) if on_cpu(tensor) else tensor.dtype
