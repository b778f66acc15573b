"""Rewards from the policy's own certainty about the tokens that it sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch

from megatron_urlvr.config.base import Section
from megatron_urlvr.types import Group

from .base import NoOptions, Reward, statistics
from .registry import register

FLOAT32_ZERO = -103.98
"""exp of anything below this rounds to zero in float32 (its smallest subnormal is 2^-149, half of that is the edge)."""


class Aggregated(Section):
    """Options of the rewards that reduce a token statistic to one number."""

    aggregation: Literal["mean", "sum"]
    """Over the response's tokens. It must be given: `mean` is the form of the URLVR study and of RENT and favours
    padding with low-entropy repetition, `sum` is EM-RL's and favours short responses."""


class TokenReduction(Reward[Aggregated]):
    """`sign` times the mean or the sum of one token statistic over the response. `[n]` float64."""

    Options = Aggregated
    statistic: ClassVar[str]
    sign: ClassVar[float] = 1.0

    def score(self, group: Group) -> torch.Tensor:
        return self.score_groups([group])[0]

    def score_groups(self, groups: Sequence[Group]) -> list[torch.Tensor]:
        totals, lengths = _sums(self, groups, self.statistic)
        if self.options.aggregation == "mean":
            totals = totals / lengths
        return list(torch.split(self.sign * totals, [len(group) for group in groups]))


@register
class SelfCertainty(TokenReduction):
    """How far each next-token distribution is from uniform. Code bases that log `lse - mean(z)` log this plus the
    constant log V. Unbounded, and dominated by the least likely tokens; entropy is not."""

    name = "self_certainty"
    needs = frozenset({"self_certainty"})
    statistic = "self_certainty"
    formula = "mean|sum_t KL(U || p_t) = mean|sum_t (lse(z_t) - mean_v z_tv - log V)"
    value_range = "[0, inf)"
    source = "Intuitor / RLIF (arXiv 2505.19590); URLVR (arXiv 2603.08660) Table 1, with the mean"


@register
class TokenEntropy(TokenReduction):
    """Negative entropy of the next-token distributions along the response."""

    name = "token_entropy"
    needs = frozenset({"entropy"})
    statistic = "entropy"
    sign = -1.0
    formula = "-mean|sum_t H(p_t)"
    value_range = "mean: [-log V, 0]; sum: [-T log V, 0]"
    source = "EM-RL-token (arXiv 2505.15134, eq. 4: sum); RENT and URLVR (arXiv 2603.08660) Table 1: mean"


@register
class TrajectoryEntropy(TokenReduction):
    """Log-probability of the response: the one-sample estimate of the trajectory's negative entropy."""

    name = "trajectory_entropy"
    needs = frozenset({"logp"})
    statistic = "logp"
    formula = "mean|sum_t log p(y_t)"
    value_range = "(-inf, 0]"
    source = "EM-RL-sequence (arXiv 2505.15134, eq. 3: sum); URLVR (arXiv 2603.08660) Table 1: mean"


@register
class Probability(Reward[NoOptions]):
    """Probability of the whole response, not normalised by length. `[n]` float64.

    At .9 per token a thousand tokens have probability 1e-46, zero in float32: whole groups would lose their signal, or
    leave it to their shortest sample. Where the scale of a group does not matter (`scale_free`), the scores are
    `exp(s - max s)` instead of `exp(s)`, the same but for a factor common to the group; else they are float64, which
    reaches down to 5e-324. Metrics: `underflow`, scores that are zero all the same; `underflow_float32`, those that
    float32 would have lost.
    """

    name = "probability"
    needs = frozenset({"logp"})
    formula = "prod_t p(y_t) = exp(sum_t log p(y_t)); over the group's largest where its scale does not matter"
    value_range = "[0, 1]"
    source = "RLSC (arXiv 2506.06395); URLVR (arXiv 2603.08660) Table 1"

    def score(self, group: Group) -> torch.Tensor:
        return self.score_groups([group])[0]

    def score_groups(self, groups: Sequence[Group]) -> list[torch.Tensor]:
        totals, _ = _sums(self, groups, "logp")
        pieces = torch.split(totals, [len(group) for group in groups])
        return [torch.exp(piece - piece.max() if self.scale_free and len(piece) else piece) for piece in pieces]

    def counts(self, groups: Sequence[Group], scores: Sequence[torch.Tensor]) -> Sequence[Mapping[str, float]]:
        totals, _ = _sums(self, groups, "logp")
        lost = torch.split((totals < FLOAT32_ZERO).double(), [len(group) for group in groups])
        return [
            {"underflow": float((own == 0).double().mean()), "underflow_float32": float(share.mean())}
            for own, share in zip(scores, lost, strict=True)
        ]


def _sums(
    reward: Reward[NoOptions] | Reward[Aggregated], groups: Sequence[Group], name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the statistic `name` over each sample's tokens, and the numbers of tokens: `[N]` float64 each."""
    flat, lengths = statistics(reward, groups, name)
    counts = torch.tensor(lengths, dtype=torch.int64)
    # float64 and one segment a sample: the sum does not depend on which samples stand beside it
    return torch.segment_reduce(flat, "sum", lengths=counts), counts.double()
