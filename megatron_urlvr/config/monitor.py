"""`monitor` and `checkpoint`: what a run writes while it goes on."""

from typing import Literal

from pydantic import Field

from .base import Section, rule

ONSET_STEPS = 6
"""Most steps that the onset of a collapse is dated back from the first suspicious step."""


class CollapseSection(Section):
    """The label-free collapse detector; see docs/collapse.md."""

    action: Literal["warn", "stop", "rollback"] = "warn"
    """On a collapse: `warn` says so and goes on; `stop` ends the run (exit code 3); `rollback` ends it with the weights
    of the newest snapshot from before the collapse."""
    baseline_steps: int = Field(default=5, ge=2)
    """First steps, which say what is normal (median and median absolute deviation)."""
    window: int = Field(default=3, ge=1)
    """Each signal is the median of its last so many values."""
    patience: int = Field(default=3, ge=1)
    """Suspicious steps in a row before the alarm."""
    deviations: float = Field(default=6.0, ge=0)
    """A signal must leave its baseline by so many standard deviations (from the median absolute deviation), and by its
    own least limit."""
    snapshot_every: int = Field(default=2, ge=1)
    """Under `action: rollback`, keep the weights each so many steps."""
    snapshots: int = Field(default=8, ge=2)
    """Newest snapshots kept; together they must reach back from an alarm to before the onset."""

    @rule("action", "snapshot_every", "snapshots", "patience", "window")
    def _reach(self) -> str | None:
        reach, needed = self.snapshot_every * (self.snapshots - 1), self.patience + self.window + ONSET_STEPS
        if self.action == "rollback" and reach < needed:
            return (
                f"snapshots = {self.snapshots}, each snapshot_every = {self.snapshot_every} steps, reach {reach} steps"
                f" back, but the onset of a collapse may lie patience + window + {ONSET_STEPS} = {needed} steps before"
                " its alarm: keep more snapshots"
            )
        return None


class MonitorSection(Section):
    tensorboard: bool = True
    """Write event files for TensorBoard to `tensorboard/` in the run's folder."""
    wandb: bool = False
    """Log to Weights & Biases too (extra `[wandb]`)."""
    probes: int = Field(default=4, ge=0)
    """Fixed prompts whose samples are kept at every evaluation, for the report."""
    collapse: CollapseSection = CollapseSection()
    """The label-free collapse detector."""


class CheckpointSection(Section):
    every: int = Field(default=50, ge=0)
    """Save each so many steps; 0 only at the end and on signals."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    background: bool = False
    """Write the checkpoints of `every` while training goes on, from a copy in host memory. The last one, and that of a
    signal, are waited for."""
