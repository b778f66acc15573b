"""`monitor` and `checkpoint`: what a run writes while it goes on."""

from pydantic import Field

from .base import Section


class MonitorSection(Section):
    tensorboard: bool = True
    """Write event files for TensorBoard to `tensorboard/` in the run's folder."""
    wandb: bool = False
    """Log to Weights & Biases too (extra `[wandb]`)."""
    probes: int = Field(default=4, ge=0)
    """Fixed prompts whose samples are kept at every evaluation, for the report."""


class CheckpointSection(Section):
    every: int = Field(default=50, ge=0)
    """Save each so many steps; 0 only at the end and on signals."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
