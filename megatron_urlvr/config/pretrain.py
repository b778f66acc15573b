"""The config of `urlvr pretrain`: a small base policy from next-token prediction."""

from typing import Any, Literal

from pydantic import Field, model_validator

from .base import Section
from .optim import OptimSection


class ArchitectureSection(Section):
    """A small Qwen2 model."""

    layers: int = Field(default=2, ge=1)
    hidden: int = Field(default=64, ge=8)
    ffn: int = Field(default=256, ge=8)
    heads: int = Field(default=4, ge=1)
    kv_heads: int = Field(default=4, ge=1)
    tied: bool = False
    """Share input and output embeddings."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Width of the logits; None: the tokenizer's size."""
    init_std: float = Field(default=0.05, gt=0)


class Snapshot(Section):
    """When to save a base policy: at a step, or when held-out maj@16 enters a band."""

    step: int | None = Field(default=None, ge=0)
    maj_at_least: float | None = Field(default=None, ge=0, le=1)
    """First check whose maj@16 is at least this."""
    maj_at_most: float | None = Field(default=None, ge=0, le=1)
    """Upper end of the band; a check beyond it is reported as a miss of the band, and saved all the same."""

    @model_validator(mode="after")
    def _one_rule(self) -> "Snapshot":
        if (self.step is None) == (self.maj_at_least is None):
            raise ValueError("a snapshot is named by `step` or by `maj_at_least`, one of the two")
        return self


class PretrainRun(Section):
    name: str = Field(min_length=1)
    dir: str = Field(min_length=1)
    """Folder of the bases: each snapshot becomes `dir/<hash of this config>/<snapshot>`."""
    seed: int = Field(ge=0, lt=2**31)
    steps: int = Field(ge=1)
    """Most steps; training ends earlier once every snapshot is saved."""
    batch: int = Field(default=128, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=1, ge=1)


class PretrainData(Section):
    task: str
    settings: dict[str, Any] = Field(default_factory=dict)
    max_new_tokens: int = Field(ge=1)
    held_out: int = Field(default=128, ge=1)
    """Prompts of the held-out set that snapshots are measured on; never trained on."""
    check_every: int = Field(default=10, ge=1)
    """Steps between measurements of maj@16 once a band is awaited."""


class PretrainConfig(Section):
    run: PretrainRun
    data: PretrainData
    model: ArchitectureSection = ArchitectureSection()
    optim: OptimSection
    snapshots: dict[str, Snapshot] = Field(min_length=1)
    """Base policies to save, by name."""
