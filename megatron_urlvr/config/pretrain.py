"""The config of `urlvr pretrain`: a small base policy from next-token prediction."""

from typing import Literal

from pydantic import Field

from .base import Section, rule
from .data import TaskChoice
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

    @rule("step", "maj_at_least")
    def _one_way(self) -> str | None:
        if (self.step is None) == (self.maj_at_least is None):
            return "a snapshot is taken at a `step` or when `maj_at_least` is reached: give one of the two"
        return None

    @rule("maj_at_least", "maj_at_most")
    def _band(self) -> str | None:
        if self.maj_at_most is None:
            return None
        if self.maj_at_least is None:
            return f"maj_at_most = {self.maj_at_most} is the upper end of a band: give maj_at_least too"
        if self.maj_at_most <= self.maj_at_least:
            return f"maj_at_most = {self.maj_at_most} must be above maj_at_least = {self.maj_at_least}"
        return None


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


class PretrainData(TaskChoice):
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
