"""`urlvr doctor`: what this machine has, and what follows for a run on it."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

NEEDED = ("torch", "megatron-core", "transformers", "safetensors", "tensorboard", "math-verify", "zstandard")
OPTIONAL = {
    "transformer-engine": "transformer_engine",
    "apex": "apex",
    "triton": "triton",
    "sglang": "sglang",
    "nemo-run": "nemo_run",
    "wandb": "wandb",
}
"""Distributions that add something, and what they are imported as."""
LOW_DISK = 5e9
"""Bytes below which a warning is due: checkpoints of a small model with a few figures fit."""


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int
    """Bytes."""
    capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """What there is."""

    python: str
    system: str
    versions: dict[str, str | None]
    """Of NEEDED and OPTIONAL; None where a distribution is not installed."""
    cores: int
    """That this process may run on."""
    threads: str | None
    """OMP_NUM_THREADS."""
    memory: int
    """Bytes, in all."""
    memory_free: int
    disk_free: int
    """Bytes, where the command runs."""
    folder: Path
    cuda: str | None
    """Version torch was built with; None for a CPU build."""
    gpus: list[Gpu] = field(default_factory=list)


def examine() -> str:
    """The machine and what follows, as text."""
    machine = look()
    lines = [*_facts(machine), "", "What follows:", *(f"  - {sentence}" for sentence in follows(machine))]
    return "\n".join(lines) + "\n"


def look() -> Machine:
    """What this machine has. Nothing heavy is imported but torch."""
    memory = psutil.virtual_memory()
    folder = Path.cwd()
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            gpus.append(Gpu(found.name, found.total_memory, (found.major, found.minor)))
    return Machine(
        python=platform.python_version(),
        system=platform.platform(),
        versions={name: _version(name) for name in (*NEEDED, *OPTIONAL)},
        cores=len(os.sched_getaffinity(0)),
        threads=os.environ.get("OMP_NUM_THREADS"),
        memory=memory.total,
        memory_free=memory.available,
        disk_free=shutil.disk_usage(folder).free,
        folder=folder,
        cuda=torch.version.cuda,
        gpus=gpus,
    )


def follows(machine: Machine) -> list[str]:
    """What the machine means for a run, a sentence each; what is missing first."""
    sentences = [
        f"{name} is not installed, and nothing runs without it: pip install megatron-urlvr"
        for name in NEEDED
        if machine.versions[name] is None
    ]
    sentences += _device(machine)
    if not machine.gpus and machine.threads is None and machine.cores > 1:
        sentences.append(
            f"OMP_NUM_THREADS is not set: run.threads decides (1 by default), of {machine.cores} cores. With small "
            "models one thread for each process is fastest, and several runs at once use the other cores."
        )
    if machine.disk_free < LOW_DISK:
        sentences.append(f"only {_gigabytes(machine.disk_free)} are free in {machine.folder}: lower checkpoint.keep.")
    extras = {
        "sglang": "no SGLang here: rollouts come from the embedded engine (servers have an environment of their own)",
        "nemo-run": "no nemo-run: NeMo-Run recipes need pip install 'megatron-urlvr[nemo]'",
        "wandb": "no wandb: monitor.wandb=true needs pip install 'megatron-urlvr[wandb]'",
    }
    sentences += [f"{sentence}." for name, sentence in extras.items() if machine.versions[name] is None]
    return sentences


def _device(machine: Machine) -> list[str]:
    if not machine.gpus:
        why = "torch is a CPU build" if machine.cuda is None else "torch was built with CUDA, but sees no device"
        return [
            f"run.device=auto takes the CPU ({why}): gloo between processes, float32, and Megatron-Core's local layers."
        ]
    count = "one GPU" if len(machine.gpus) == 1 else f"{len(machine.gpus)} GPUs"
    sentences = [f"run.device=auto takes CUDA ({count}): NCCL between processes, and bfloat16 where model.dtype=auto."]
    if machine.versions["transformer-engine"] is None:
        sentences.append(
            "no Transformer Engine: the policy is built from Megatron-Core's local layers, which is slower; "
            "pip install 'megatron-urlvr[gpu]'."
        )
    else:
        sentences.append("the policy is built from Transformer Engine's layers.")
    if machine.versions["triton"] is None:
        sentences.append("no Triton: token statistics are computed by the chunked torch version.")
    return sentences


def _facts(machine: Machine) -> list[str]:
    threads = f"OMP_NUM_THREADS={machine.threads}" if machine.threads else "OMP_NUM_THREADS not set"
    facts = [
        ("python", f"{machine.python} on {machine.system}"),
        ("cpu", f"{machine.cores} cores, {threads}"),
        ("memory", f"{_gigabytes(machine.memory)}, {_gigabytes(machine.memory_free)} free"),
        ("disk", f"{_gigabytes(machine.disk_free)} free in {machine.folder}"),
        ("cuda", machine.cuda or "none: torch is a CPU build"),
    ]
    facts += [
        ("gpu", f"{gpu.name}, {_gigabytes(gpu.memory)}, compute capability {gpu.capability[0]}.{gpu.capability[1]}")
        for gpu in machine.gpus
    ] or [("gpu", "none")]
    facts += [(name, found or "not installed") for name, found in machine.versions.items()]
    width = max(len(name) for name, _ in facts)
    return [f"{name:<{width}}  {text}" for name, text in facts]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        # Some of these are also installed from source trees, without metadata.
        return "installed, version unknown" if name in OPTIONAL and find_spec(OPTIONAL[name]) else None


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
