"""What a plan takes for granted: figures of GPUs, from their data sheets, and assumptions that the user may replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from ...config.base import Section
from ...config.errors import did_you_mean
from ...exit_codes import UnusableInput

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class GPU:
    """One kind of GPU in nodes of eight. Link figures are of one direction."""

    name: str
    memory: int
    """Bytes that the driver reports (nvidia-smi), a little less than what is sold."""
    tflops: float
    """Dense bfloat16 matrix rate, 10^12 operations a second."""
    memory_gb_s: float
    nvlink_gb_s: float
    """To the other GPUs of the node."""
    network_gb_s: float
    """To other nodes: one network card for each GPU, as in DGX and HGX systems."""
    source: str
    per_node: int = 8


GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        GPU("A100-80GB", 81920 * MIB, 312.0, 2039.0, 300.0, 25.0, "data sheets: A100 SXM; DGX A100"),
        GPU("H100-80GB", 81559 * MIB, 989.4, 3350.0, 450.0, 50.0, "data sheets: H100 SXM; DGX H100"),
        GPU("H200-141GB", 143771 * MIB, 989.4, 4800.0, 450.0, 50.0, "data sheets: H200 SXM; DGX H200"),
    )
}  # fmt: skip


def gpu_named(name: str) -> GPU:
    """The GPU of that name; UnusableInput lists the known ones."""
    if name not in GPUS:
        raise UnusableInput(f"--gpu {name}: no such GPU.{did_you_mean(name, GPUS)} Known: {', '.join(GPUS)}.")
    return GPUS[name]


class Assumptions(Section):
    """What no data sheet says. Every estimate that rests on one of these is only as good as it is."""

    mean_response: float = Field(default=0.5, ge=0.5, le=1)
    """Mean response length as a share of `rollout.max_new_tokens`, and mean answer of those that providers ask as a
    share of theirs; lengths are spread evenly around it, up to the longest. Memory is planned for the longest."""
    mean_prompt: float = Field(default=0.25, gt=0, le=1)
    """Mean prompt length as a share of `data.max_prompt_tokens`."""
    characters_per_token: float = Field(default=4.0, gt=0)
    """Characters a token of the text that a judge is asked with, beside question and response."""
    taught_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the responses whose verdicts a co-trained judge is trained on: as many right as wrong ones, so 1 where
    half of them are right, and 0.5 where a quarter or three quarters are."""
    expert_imbalance: float = Field(default=1.5, ge=1)
    """Tokens of the fullest expert-parallel rank over the mean. Nothing balances experts while the policy is trained,
    and routers were balanced over all of pretraining's texts, not over a run's few prompts; how much is not measured.
    """
    compute_efficiency: float = Field(default=0.5, gt=0, le=1)
    """Share of the matrix rate that a layer reaches between two communications, forward and backward. Tuned
    pretraining of dense models on H100 is published with 41 to 48 % of it end to end (Megatron-LM's README)."""
    memory_efficiency: float = Field(default=0.7, gt=0, le=1)
    """Share of the memory bandwidth that decoding and the optimizer reach."""
    link_efficiency: float = Field(default=0.7, gt=0, le=1)
    """Share of a link's rate that collectives reach. No communication is hidden behind computation."""
    decode_step_ms: float = Field(default=3.0, ge=0)
    """Time of one decode step that neither weights nor cache explain: launches, all-reduces, sampling, scheduling."""
    host_gb_s: float = Field(default=20.0, gt=0)
    """Rate at which a GPU reads the reference, the moving average or the optimizer from the host's memory, and writes
    there; PCIe 4 x16 has 32."""
    disk_gb_s: float = Field(default=2.0, gt=0)
    """Rate at which the trainer's first rank writes the snapshot of the weights."""
    trainer_reserve_gib: float = Field(default=5.0, ge=0)
    """Memory of a trainer's GPU that is not planned: CUDA context, NCCL's buffers, fragmentation."""
    sleeping_server_gib: float = Field(default=4.0, ge=0)
    """Memory of a GPU that a colocated server keeps while it sleeps, and needs beside weights and cache when it does
    not: CUDA context, CUDA graphs, workspaces."""


def assume(overrides: Sequence[str]) -> Assumptions:
    """The assumptions with `name=value` laid over them; UnusableInput says what cannot be assumed."""
    from ...config.errors import ConfigError, validate
    from ...config.loader import parse_override

    values = {}
    for text in overrides:
        try:
            key, value = parse_override(text)
        except ValueError as error:
            raise UnusableInput(f"--assume {error}") from None
        values[".".join(key)] = value
    found, violations = validate(Assumptions, values)
    if found is None:
        raise ConfigError(violations, "--assume")
    return found
