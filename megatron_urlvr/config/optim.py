"""`optim`: the optimizer and its schedule."""

from typing import Literal

from pydantic import Field

from .base import Section, rule


class OptimSection(Section):
    lr: float = Field(gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """What follows the warm-up: `constant`, or down to `min_lr`, which a step after the horizon would have."""
    schedule_steps: int | None = Field(default=None, ge=1)
    """Horizon of cosine and linear (Megatron-LM's lr-decay-iters), in steps as `run.steps` counts them; None:
    `run.steps`. Later steps are taken at `min_lr`. A run keeps the horizon that it began with: give it to raise
    `run.steps`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up from 0, in optimizer steps."""
    min_lr: float = Field(default=0.0, ge=0)
    """Floor of cosine and linear."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of AdamW's second moment."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Global gradient norm; 0 does not clip."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the weights' moving average; None keeps none."""

    offload: bool = False
    """Keep AdamW's float32 masters and moments in host memory, and on the device for the optimizer's step alone. Needs
    `parallel.distributed_optimizer`."""

    def horizon(self, steps: int) -> int | None:
        """Steps over which the rate falls in a run of `steps`; None where it does not."""
        return None if self.schedule == "constant" else self.schedule_steps or steps

    @rule("schedule", "schedule_steps", "min_lr")
    def _falling(self) -> str | None:
        if self.schedule == "constant" and self.schedule_steps is not None:
            return (
                f"schedule_steps = {self.schedule_steps} with schedule = 'constant', which has no horizon: leave it "
                "out, or set schedule to cosine or linear"
            )
        if self.schedule == "constant" and self.min_lr > 0:
            return (
                f"min_lr = {self.min_lr} with schedule = 'constant', which never falls to it: leave it out, or set "
                "schedule to cosine or linear"
            )
        return None

    @rule("min_lr", "lr")
    def _floor(self) -> str | None:
        return f"min_lr = {self.min_lr} is above lr = {self.lr}: it is the floor" if self.min_lr > self.lr else None
