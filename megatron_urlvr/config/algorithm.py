"""`algorithm`: from rewards to a loss."""

from typing import Literal

from pydantic import Field, field_validator

from .base import Section


class LossSection(Section):
    name: Literal["ppo_clip"] = "ppo_clip"
    """The policy-gradient loss: PPO's clipped ratio."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, ge=0)
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound c of dual-clip PPO for negative advantages; None turns it off."""
    aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    """Mean over all tokens; over each response, then over responses; or the sum over `max_new_tokens` x responses."""


class KLSection(Section):
    coef: float = Field(default=0.0, ge=0)
    """Weight of the divergence to the reference; 0 turns it off."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimators of KL(policy || reference)."""
    place: Literal["loss", "reward"] = "loss"
    """Added to the loss, or taken from the reward before the advantage."""
    reference: Literal["start", "ema"] = "start"
    """The starting weights, or their exponential moving average (`optim.ema_decay`)."""


class AlgorithmSection(Section):
    advantage: str = "grpo"
    """`grpo`, `dr_grpo`, `rloo`, or one from an entry point."""
    mini_batch: int | None = Field(default=None, ge=1)
    """Prompts of one optimizer step; None: all of a step's (strictly on-policy)."""
    epochs: int = Field(default=1, ge=1)
    """Passes over a step's samples."""
    loss: LossSection = LossSection()
    """The policy-gradient loss."""
    kl: KLSection = KLSection()
    """The penalty for leaving a reference."""

    @field_validator("advantage")
    @classmethod
    def _known(cls, value: str) -> str:
        # Imported late: algorithms depend on torch.
        from megatron_urlvr.algorithms.advantages import get_advantage

        get_advantage(value)
        return value
