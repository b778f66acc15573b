"""The config of `urlvr pretrain`: a small base policy from next-token prediction."""

from typing import Literal

from pydantic import Field

from .base import Section, rule
from .data import TaskChoice
from .optim import OptimSection


class ArchitectureSection(Section):
    """A small Qwen2 model."""

    layers: int = Field(default=2, ge=1)
    """Transformer blocks."""
    hidden: int = Field(default=64, ge=8)
    """Width of the residual stream."""
    ffn: int = Field(default=256, ge=8)
    """Channels of the feed-forward layer."""
    heads: int = Field(default=4, ge=1)
    """Attention heads."""
    kv_heads: int = Field(default=4, ge=1)
    """Key-value heads; fewer than `heads` share them in groups."""
    tied: bool = False
    """Share input and output embeddings."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Width of the logits; None: the tokenizer's size."""
    init_std: float = Field(default=0.05, gt=0)
    """Standard deviation of the initial weights."""

    @rule("hidden", "heads")
    def _head_width(self) -> str | None:
        if self.hidden % self.heads:
            return f"heads = {self.heads} does not divide hidden = {self.hidden}: each head takes an equal part of it"
        if (width := self.hidden // self.heads) % 2:
            return (
                f"hidden = {self.hidden} over heads = {self.heads} makes heads {width} wide: rotary positions turn "
                "pairs of channels, so it must be even"
            )
        return None

    @rule("heads", "kv_heads")
    def _grouped_heads(self) -> str | None:
        if self.heads % self.kv_heads:
            return f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}: each serves as many heads"
        return None


class Snapshot(Section):
    """When to save a base policy: at a step, or when held-out maj@16 enters a band."""

    step: int | None = Field(default=None, ge=0)
    """After this training step; 0 is the untrained model."""
    maj_at_least: float | None = Field(default=None, ge=0, le=1)
    """Lower end of the band."""
    maj_at_most: float | None = Field(default=None, ge=0, le=1)
    """Upper end of the band; when checks jump over it, that is reported, and the snapshot taken all the same."""
    take: Literal["first", "last"] = "first"
    """Which check inside the band. `last`, before two in a row are above it: a policy that has only just learned to
    answer is about as unsure of its right answers as of its wrong ones."""

    @rule("step", "maj_at_least")
    def _one_way(self) -> str | None:
        if (self.step is None) == (self.maj_at_least is None):
            return "a snapshot is taken at a `step` or when `maj_at_least` is reached: give one of the two"
        return None

    @rule("take", "maj_at_most")
    def _last_of_a_band(self) -> str | None:
        if self.take == "last" and self.maj_at_most is None:
            return "take: last needs maj_at_most, the end of the band"
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
    """Name in logs."""
    dir: str = Field(min_length=1)
    """Folder of the bases: each snapshot becomes `dir/<hash of this config>/<snapshot>`."""
    seed: int = Field(ge=0, lt=2**31)
    """Varies the initial weights, the prompts and the demonstrations."""
    steps: int = Field(ge=1)
    """Most steps; training ends earlier once every snapshot is saved."""
    batch: int = Field(default=128, ge=1)
    """Demonstrations of one step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA when a device is there."""
    threads: int = Field(default=1, ge=1)
    """CPU threads."""


class PretrainData(TaskChoice):
    max_new_tokens: int = Field(ge=1)
    """Longest response when snapshots are measured, in tokens."""
    held_out: int = Field(default=128, ge=1)
    """Prompts of the held-out set that snapshots are measured on; never trained on."""
    check_every: int = Field(default=10, ge=1)
    """Steps between measurements of maj@16 once a band is awaited."""


class PretrainConfig(Section):
    run: PretrainRun
    """What it is called, where the bases go, how long it goes on."""
    data: PretrainData
    """The task whose demonstrations are learned."""
    model: ArchitectureSection = ArchitectureSection()
    """Sizes of the model, of Qwen2's architecture."""
    optim: OptimSection
    """The optimizer and its schedule."""
    snapshots: dict[str, Snapshot] = Field(min_length=1)
    """Base policies to save, by name."""

    @rule("run.steps", "snapshots")
    def _snapshots_in_reach(self) -> str | None:
        late = [name for name, shot in self.snapshots.items() if shot.step is not None and shot.step > self.run.steps]
        if not late:
            return None
        return (
            f"snapshots {', '.join(late)}: their step is after the last one, run.steps = {self.run.steps}; "
            "train longer or take them earlier"
        )
