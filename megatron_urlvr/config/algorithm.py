"""`algorithm`: from rewards to a loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from .base import Section, rule, unread

LossName = Literal["ppo_clip", "gspo", "cispo", "kl_cov", "em_ft", "self_certainty", "rlsc"]


class LossCommon(Section):
    """What every loss has."""

    aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    """Mean over all tokens; over each response, then over responses; or the sum over `max_new_tokens` x responses."""

    @classmethod
    def surviving(cls, parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
        """Another loss starts from its own settings."""
        if child.get("name", parent.get("name")) == parent.get("name"):
            return dict(parent)
        return {key: value for key, value in parent.items() if key in LossCommon.model_fields}


class RatioLoss(LossCommon):
    """A policy gradient with the ratio to the policy that sampled."""


class LossSection(RatioLoss):
    """The policy-gradient loss: PPO's clipped ratio."""

    name: LossName = "ppo_clip"
    """Which loss is minimised."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, ge=0)
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound c of dual-clip PPO for negative advantages; None turns it off."""


class GSPOSection(RatioLoss):
    """GSPO: one ratio for a response, the geometric mean of its tokens' ratios, clipped as PPO's is. With `aggregation:
    sequence_mean` it is the paper's."""

    name: LossName = "gspo"
    """Which loss is minimised."""
    clip_low: float = Field(default=3e-4, ge=0, lt=1)
    """The response's ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=4e-4, ge=0)
    """The response's ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound c of dual clip for negative advantages; None turns it off."""


class CISPOSection(RatioLoss):
    """CISPO: the clipped ratio weighs the log-probability and has no gradient, so that no token's gradient is lost."""

    name: LossName = "cispo"
    """Which loss is minimised."""
    clip_low: float = Field(default=1.0, ge=0, le=1)
    """The weight is clipped below at 1 - clip_low; 1 is no bound, as in the paper's runs."""
    clip_high: float = Field(default=0.2, ge=0)
    """The weight is clipped above at 1 + clip_high. The paper tunes it and does not print it."""


class KLCovSection(RatioLoss):
    """KL-Cov: no clip; the tokens in which log-probability and advantage vary together most are held near the policy
    that sampled. It needs more than one optimizer step for a step's samples."""

    name: LossName = "kl_cov"
    """Which loss is minimised."""
    share: float = Field(default=2e-3, gt=0, lt=1)
    """Share of the mini-batch's tokens that are held."""
    coef: float = Field(default=1.0, gt=0)
    """Weight of |log p - log p_old| on them."""


class DirectSection(LossCommon):
    """Direct minimisation of a statistic of the policy's own samples, without rewards: `em_ft` its token entropy,
    `self_certainty` minus its self-certainty. The reward terms are measured and not trained on."""

    name: LossName = "em_ft"
    """Which loss is minimised."""


class RLSCSection(LossCommon):
    """RLSC's loss: minus the log-probability of each response, weighted by its probability when sampled plus alpha.
    The reward terms are measured and not trained on."""

    name: LossName = "rlsc"
    """Which loss is minimised."""
    alpha: float = Field(default=0.1, ge=0)
    """Smoothing added to each response's probability."""


def kind_of_loss(value: Any) -> str:
    """Tag of a loss as written: the section that its name belongs to; PPO's without a name or with an unknown one."""
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    kinds = {"em_ft": "direct", "self_certainty": "direct"}
    return kinds.get(str(name), str(name) if name in ("rlsc", "gspo", "cispo", "kl_cov") else "ppo")


LossSpec = Annotated[
    Annotated[LossSection, Tag("ppo")]
    | Annotated[GSPOSection, Tag("gspo")]
    | Annotated[CISPOSection, Tag("cispo")]
    | Annotated[KLCovSection, Tag("kl_cov")]
    | Annotated[DirectSection, Tag("direct")]
    | Annotated[RLSCSection, Tag("rlsc")],
    Discriminator(kind_of_loss),
]
"""A policy-gradient loss (`{name: ppo_clip}`) or a direct one (`{name: em_ft}`)."""


class KLSection(Section):
    coef: float = Field(default=0.0, ge=0)
    """Weight of the divergence to the reference; 0 turns it off."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimators of KL(policy || reference)."""
    place: Literal["loss", "reward"] = "loss"
    """Added to the loss, or taken from the reward before the advantage."""
    reference: Literal["start", "ema"] = "start"
    """The starting weights, or their exponential moving average (`optim.ema_decay`)."""

    @classmethod
    def surviving(cls, parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
        """A layer that turns the penalty off turns off what the layers below said of it."""
        return {} if child.get("coef") == 0 else dict(parent)

    @rule("coef", "estimator", "place", "reference")
    def _is_on(self) -> str | None:
        if self.coef == 0 and (given := unread(self, "estimator", "place", "reference")):
            return f"{', '.join(given)} with coef = 0, which turns the penalty off: set coef, or leave the others out"
        return None


BOUNDS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "truncate": frozenset({"high"}),
    "mask": frozenset({"low", "high"}),
    "sequence": frozenset({"high"}),
    "reject": frozenset({"low", "high"}),
}
"""Bounds that each method of correction reads."""


class CorrectionSection(Section):
    """What is done about tokens that other weights, or another engine, sampled."""

    old_logp: Literal["recomputed", "rollout"] = "recomputed"
    """What the loss's ratio is taken against. `recomputed`: the trainer's log-probs before the step's first update (of
    one update a step the ratio is 1, and nothing is recomputed); `rollout`: those that came with the responses."""
    method: Literal["none", "truncate", "mask", "sequence", "reject"] = "none"
    """Weight of a token, from its ratio r of trainer to engine before the first update: `truncate` min(r, high), `mask`
    r inside [low, high] and else 0; `sequence` and `reject` do the like with the geometric mean over the response."""
    low: float = Field(default=0.5, ge=0, le=1)
    """Lower bound of `mask` and `reject`."""
    high: float = Field(default=2.0, ge=1)
    """Upper bound of every method."""
    alarm: float | None = Field(default=0.1, gt=0)
    """Mean |log p - log mu| of trainer and engine, in nats, above which a line is printed and `mismatch/alarm` is 1.
    None: no alarm."""

    @classmethod
    def surviving(cls, parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
        """Another method keeps the bounds that it reads."""
        dropped = {"low", "high"} - BOUNDS.get(str(child.get("method")), frozenset({"low", "high"}))
        return {key: value for key, value in parent.items() if key not in dropped}

    @rule("method", "low", "high")
    def _reads_its_bounds(self) -> str | None:
        read = BOUNDS[self.method]
        if given := unread(self, *sorted({"low", "high"} - read)):
            return (
                f"{', '.join(given)} with method = {self.method!r}, which reads {', '.join(read) or 'no bound'}: "
                "leave it out, or set a method that reads it"
            )
        return None

    @rule("old_logp", "method")
    def _once(self) -> str | None:
        if self.old_logp == "rollout" and self.method != "none":
            return (
                f"old_logp = 'rollout' with method = {self.method!r} would count the same ratio twice: with old_logp: "
                "rollout the loss's own ratio is the one of trainer to engine; set one of the two"
            )
        return None


class AlgorithmSection(Section):
    advantage: str = "grpo"
    """`grpo`, `dr_grpo`, `rloo`, `reinforce_pp`, `reinforce_pp_baseline`, `zero` (a control), or one from an entry
    point."""
    entropy_scaling: bool = False
    """ETTRL: scale each advantage by 1 + (mean H - H) / mean H, with H the response's mean token entropy and mean H its
    group's."""
    mini_batch: int | None = Field(default=None, ge=1)
    """Prompts of one optimizer step; None: all of a step's (strictly on-policy)."""
    epochs: int = Field(default=1, ge=1)
    """Passes over a step's samples."""
    loss: LossSpec = LossSection()
    """What is minimised: the clipped policy gradient, or a statistic directly."""
    kl: KLSection = KLSection()
    """The penalty for leaving a reference."""
    correction: CorrectionSection = CorrectionSection()
    """Off-policy corrections."""

    @rule("loss.name", "correction.old_logp")
    def _ratio_of_what(self) -> str | None:
        if self.correction.old_logp == "rollout" and not isinstance(self.loss, RatioLoss):
            return (
                f"correction.old_logp = 'rollout' with loss.name = {self.loss.name!r}, which has no ratio: set "
                "correction.old_logp=recomputed; correction.method weighs the tokens of any loss"
            )
        return None

    @rule("loss.name", "kl", "entropy_scaling", "advantage")
    def _trains_on_rewards(self) -> str | None:
        if isinstance(self.loss, RatioLoss):
            return None
        direct = f"loss.name = {self.loss.name!r}, which trains on no reward"
        if self.kl.coef > 0 and self.kl.place == "reward":
            return f"kl.coef = {self.kl.coef} and kl.place = 'reward' with {direct}: set kl.place=loss, or kl.coef=0"
        if self.entropy_scaling:
            return f"entropy_scaling = true with {direct}: there are no advantages to scale; leave one of the two out"
        if self.advantage != type(self).model_fields["advantage"].default:
            return f"advantage = {self.advantage!r} with {direct}: no advantage is made; leave one of the two out"
        return None

    @field_validator("advantage")
    @classmethod
    def _known(cls, value: str) -> str:
        # Imported late: algorithms depend on torch.
        from megatron_urlvr.algorithms.advantages import get_advantage

        get_advantage(value)
        return value
