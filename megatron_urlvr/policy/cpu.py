"""The one file that lets Megatron-Core (0.16.x) run without CUDA, on gloo.

Megatron-Core asks `torch.cuda` for its device and random state and waits for it, builds scalars on `device="cuda"`,
and tells tensor types apart by the string `torch.cuda.FloatTensor`. On a machine without CUDA, `install()` hands every
`megatron.*` module a namespace of its own under the global name `torch`, in which those calls mean the CPU. Other
modules keep the real `torch`; the two methods that Megatron calls on tensors (`Tensor.cuda`, `Tensor.type`) are the
only global changes. With CUDA there, `install()` does nothing.

Here is what the layouts of this package were seen to call, and no more: another path (interleaved stages, asynchronous
checkpoints) adds what it needs, with its test.

`tests/unit/policy/test_cpu.py` fails when a piece is no longer needed.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import logging
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return wrapped


def _cuda_namespace() -> types.ModuleType:
    """`torch.cuda` as Megatron may use it where there is no CUDA."""
    cuda = types.ModuleType("torch.cuda")
    cuda.__dict__.update(torch.cuda.__dict__)
    changes: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "synchronize": lambda *args: None,
        "get_rng_state": torch.get_rng_state,
        "manual_seed": torch.manual_seed,
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
    for name in _FACTORIES:
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
            if patch := _PATCHES.get(name):
                patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def installed() -> bool:
    """Whether Megatron-Core is given the CPU namespace in this process."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def install() -> None:
    """Let Megatron-Core run on the CPU, once it is imported; until then nothing changes. This package's import does it.

    Raises RuntimeError when Megatron was imported earlier: its modules would hold the real `torch`.
    """
    if torch.cuda.is_available() or installed():
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core was imported before megatron_urlvr.policy, which must see it first on a CPU")
    sys.meta_path.insert(0, _Finder(_torch_namespace()))
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|transformer_engine|nvidia_resiliency_ext).*")


def _patch_tensors(core: Any) -> None:
    """`Tensor.cuda` is the tensor, and `Tensor.type` speaks of CUDA: optimizer.py compares it with
    'torch.cuda.FloatTensor'. Conversions stay what they are."""
    real_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return real_type(self, *args, **kwargs) if args or kwargs else f"torch.cuda.{real_type(self).split('.')[-1]}"

    torch.Tensor.type = cuda_type  # type: ignore[assignment,method-assign]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _patch_jit(jit: Any) -> None:
    """`jit_fuser` is torch.compile, which would call a C++ compiler for a few elementwise operations."""
    jit.disable_jit_fuser()


def _patch_random(random: Any) -> None:
    """The model-parallel random tracker keeps CPU states instead of CUDA ones."""
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state" not in record.getMessage())


def _patch_dispatcher(token_dispatcher: Any) -> None:
    """The dispatcher of experts copies counts of tokens from CUDA to the host, where they are already, on a stream of
    its own; the counts to exchange, which the copying makes arrays of, are made lists."""

    def counted(self: Any, point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor | None:
        for name in ("input_splits", "output_splits"):
            if isinstance(splits := getattr(self, name), torch.Tensor):
                setattr(self, name, splits.tolist())
        return tokens_per_expert

    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    dispatcher.cuda_dtoh_stream = "none"  # one is made where this is None
    dispatcher._maybe_dtoh_and_synchronize = counted


def _patch_mappings(mappings: Any) -> None:
    """gloo gathers parts of one size alone (torch 2.13), and under tensor parallelism the ranks of an expert have their
    own numbers of tokens: parts of unequal sizes are added to zeros."""
    gather = mappings._gather_along_first_dim

    def gathered(part: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return cast(torch.Tensor, gather(part, group, sizes, use_global_buffer))
        parts = [part.new_zeros(size, *part.shape[1:]) for size in sizes]
        parts[group.rank()] = part
        whole = torch.cat(parts)
        torch.distributed.all_reduce(whole, group=group)
        return whole

    mappings._gather_along_first_dim = gathered


_PATCHES: Mapping[str, Callable[[Any], None]] = {
    "megatron.core": _patch_tensors,
    "megatron.core.jit": _patch_jit,
    "megatron.core.tensor_parallel.mappings": _patch_mappings,
    "megatron.core.tensor_parallel.random": _patch_random,
    "megatron.core.transformer.moe.token_dispatcher": _patch_dispatcher,
}
"""What else changes once a module has run."""
