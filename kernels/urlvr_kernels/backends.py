"""The registry of backends."""

from __future__ import annotations

import torch

from .call import Ops
from .torch_ops import TorchOps

_TORCH = TorchOps()


def choose_ops(backend: str, like: torch.Tensor) -> Ops:
    """The backend called `backend`; "auto": the best there is for the device of `like`."""
    if backend in ("auto", "torch"):
        return _TORCH
    raise ValueError(f"backend: {backend!r} is unknown; choose auto or torch.")
