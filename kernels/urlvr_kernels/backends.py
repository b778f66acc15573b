"""The registry of backends, and which of them serves a tensor."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch

from .call import Ops
from .torch_ops import TorchOps

BACKENDS = ("auto", "torch", "triton", "cuda")


def choose_ops(backend: str, like: torch.Tensor) -> Ops:
    """The backend called `backend`; "auto": Triton's on a GPU that has it, plain torch elsewhere and for float64."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is unknown; choose among {', '.join(BACKENDS)}.")
    if backend == "auto":
        backend = "triton" if like.is_cuda and like.dtype != torch.float64 and _triton_is_there() else "torch"
    if backend == "torch":
        return _torch_ops()
    if like.dtype == torch.float64:
        raise ValueError(f"backend: {backend!r} computes in float32; float64 tensors take backend='torch'.")
    return _triton_ops(like.is_cuda) if backend == "triton" else _cuda_ops(like.device)


@lru_cache
def _torch_ops() -> Ops:
    return TorchOps()


@lru_cache
def _triton_is_there() -> bool:
    return importlib.util.find_spec("triton") is not None


@lru_cache
def _triton_ops(on_gpu: bool) -> Ops:
    if not _triton_is_there():
        raise ValueError("backend: 'triton', but triton is not installed; install it, or choose 'torch'.")
    from .triton_ops import TritonOps, is_interpreted

    if not on_gpu and not is_interpreted():
        raise ValueError(
            "backend: 'triton' needs tensors on a GPU (on a CPU only under TRITON_INTERPRET=1, set before Python "
            "starts); choose 'torch' or 'auto'."
        )
    return TritonOps()


@lru_cache
def _cuda_ops(device: torch.device) -> Ops:
    if device.type != "cuda":
        raise ValueError(f"backend: 'cuda' needs tensors on a GPU, these are on {device}; choose 'torch' or 'auto'.")
    from .cuda_ops import CudaOps

    return CudaOps(device)
