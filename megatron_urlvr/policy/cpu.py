"""The one file that lets Megatron-Core (0.16.x) run without CUDA, on gloo.

Megatron-Core asks `torch.cuda` for its device, streams, random state and memory, builds scalars on `device="cuda"`,
and tells tensor types apart by the string `torch.cuda.FloatTensor`. On a machine without CUDA, `install()` hands every
`megatron.*` module a namespace of its own under the global name `torch`, in which those calls mean the CPU. Other
modules keep the real `torch`; the two methods that Megatron calls on tensors (`Tensor.cuda`, `Tensor.type`) are the
only global changes. With CUDA there, `install()` does nothing.

`tests/unit/policy/test_cpu.py` fails when a piece is no longer needed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "as_tensor")
_FACTORIES_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like")


class _Stream:
    """Stands in for `torch.cuda.Stream` and `Event`: work on the CPU is in order already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Stream) -> float:
        return 0.0

    def _in_order(self, *args: Any, **kwargs: Any) -> None:
        pass

    synchronize = wait_stream = wait_event = record = wait = record_event = _in_order


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _cuda_namespace() -> types.ModuleType:
    """`torch.cuda` as Megatron may use it where there is no CUDA."""
    cuda = types.ModuleType("torch.cuda")
    cuda.__dict__.update(torch.cuda.__dict__)
    in_order = _Stream()._in_order
    changes: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "device_count": lambda: 1,
        "synchronize": in_order,
        "empty_cache": in_order,
        "set_device": in_order,
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda *a, **k: _Stream(),
        "default_stream": lambda *a, **k: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "memory_allocated": lambda *a, **k: 0,
        "max_memory_allocated": lambda *a, **k: 0,
        "memory_reserved": lambda *a, **k: 0,
    }
    for name, value in changes.items():
        setattr(cuda, name, value)
    return cuda


def _torch_namespace() -> types.ModuleType:
    """The `torch` that Megatron's modules see."""
    namespace = types.ModuleType("torch")
    namespace.__dict__.update(torch.__dict__)
    namespace.__getattr__ = lambda name: getattr(torch, name)  # type: ignore[method-assign]
    namespace.cuda = _cuda_namespace()  # type: ignore[attr-defined]
    for name in (*_FACTORIES, *_FACTORIES_LIKE):
        setattr(namespace, name, _on_cpu(getattr(torch, name)))
    return namespace


class _Finder(importlib.abc.MetaPathFinder):
    """After a `megatron.*` module has run, rebinds its global `torch` to the CPU namespace."""

    def __init__(self, namespace: types.ModuleType) -> None:
        self.namespace = namespace

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("megatron."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            run(module)
            if getattr(module, "torch", None) is torch:
                module.torch = self.namespace  # type: ignore[attr-defined]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def installed() -> bool:
    """Whether Megatron-Core has been given the CPU namespace in this process."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def install() -> None:
    """Make Megatron-Core importable and runnable on the CPU. Call before the first `megatron` import.

    Raises RuntimeError when Megatron was imported earlier: its modules would hold the real `torch`.
    """
    if torch.cuda.is_available() or installed():
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core was imported before megatron_urlvr.policy.cpu.install(); import it after")
    # Megatron's `jit_fuser` is torch.compile, which would call a C++ compiler for a few elementwise operations.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    sys.meta_path.insert(0, _Finder(_torch_namespace()))
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|transformer_engine|nvidia_resiliency_ext).*")
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    real_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # optimizer.py compares p.type() with 'torch.cuda.FloatTensor'; conversions stay what they are.
        return real_type(self, *args, **kwargs) if args or kwargs else f"torch.cuda.{real_type(self).split('.')[-1]}"

    torch.Tensor.type = cuda_type  # type: ignore[assignment,method-assign]
    _patch_random_state()


def _patch_random_state() -> None:
    """The model-parallel random tracker keeps CPU states instead of CUDA ones."""
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state" not in record.getMessage())
