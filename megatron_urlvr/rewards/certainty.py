"""Rewards from the policy's own certainty about the tokens that it sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from megatron_urlvr.config.base import Section, rule
from megatron_urlvr.types import Group

from .base import ANSWER, UNIT, NoOptions, Range, Reward, classes_of, statistics
from .registry import register
from .spans import SPAN_SIGNALS, Span, token_mask

FLOAT32_ZERO = -103.98
"""exp of anything below this rounds to zero in float32 (its smallest subnormal is 2^-149, half of that is the edge)."""


class Aggregated(Section):
    """Options of the rewards that reduce a token statistic to one number."""

    aggregation: Literal["mean", "sum"]
    """Over the response's tokens. It must be given: `mean` is the form of the URLVR study and of RENT and favours
    padding with low-entropy repetition, `sum` is EM-RL's and favours short responses."""
    span: Span = "all"
    """Tokens that count: `all`; `reasoning`, those before the answer; `answer`, those of the answer; `not_answer`, all
    but those. Without an answer every token is reasoning."""
    empty: float | None = None
    """Reward of a response whose span holds no token. It must be given unless the span is `all`."""

    @rule("span", "empty")
    def _empty_spans(self) -> str | None:
        if (self.span == "all") == (self.empty is None):
            return None
        if self.empty is None:
            return f"span = {self.span!r} needs empty, the reward of a response whose span holds no token"
        return f"empty = {self.empty:g} is read with a narrower span alone, and span is 'all'"


class TokenReduction(Reward[Aggregated]):
    """`sign` times the mean or the sum of one token statistic over a span of the response. `[n]` float64. Metric:
    `empty_span`, where the span is not the whole response."""

    Options = Aggregated
    statistic: ClassVar[str]
    sign: ClassVar[float] = 1.0

    def __init__(self, options: Aggregated | None = None, *, seed: int = 0) -> None:
        super().__init__(options, seed=seed)
        if self.options.span != "all":
            self.needs = type(self).needs | SPAN_SIGNALS
        if self.options.empty is not None:
            self.value_range = type(self).value_range.including(self.options.empty)

    def score(self, group: Group) -> torch.Tensor:
        return self.score_groups([group])[0]

    def score_groups(self, groups: Sequence[Group]) -> list[torch.Tensor]:
        totals, lengths = _sums(self, groups, self.statistic, self.options.span)
        if self.options.aggregation == "mean":
            totals = totals / lengths.clamp(min=1)
        scores = self.sign * totals
        if self.options.empty is not None:
            scores = torch.where(lengths == 0, self.options.empty, scores)
        return list(torch.split(scores, [len(group) for group in groups]))

    def counts(self, groups: Sequence[Group], scores: Sequence[torch.Tensor]) -> Sequence[Mapping[str, float]]:
        if self.options.span == "all":
            return [{} for _ in groups]
        return [
            {"empty_span": float(torch.tensor([not mask.any() for mask in masks]).double().mean())}
            for masks in ([*_masks(self, group, self.options.span)] for group in groups)
        ]


@register
class SelfCertainty(TokenReduction):
    """How far each next-token distribution is from uniform. Code bases that log `lse - mean(z)` log this plus the
    constant log V. Unbounded, and dominated by the least likely tokens; entropy is not."""

    name = "self_certainty"
    needs = frozenset({"self_certainty"})
    statistic = "self_certainty"
    formula = "mean|sum_t KL(U || p_t) = mean|sum_t (lse(z_t) - mean_v z_tv - log V)"
    value_range = Range(0, inf)
    source = "Intuitor / RLIF (arXiv 2505.19590); URLVR (arXiv 2603.08660) Table 1, with the mean"


@register
class TokenEntropy(TokenReduction):
    """Negative entropy of the next-token distributions along the response."""

    name = "token_entropy"
    needs = frozenset({"entropy"})
    statistic = "entropy"
    sign = -1.0
    formula = "-mean|sum_t H(p_t)"
    value_range = Range(-inf, 0, "mean: [-log V, 0]; sum: [-T log V, 0]")
    source = "EM-RL-token (arXiv 2505.15134, eq. 4: sum); RENT and URLVR (arXiv 2603.08660) Table 1: mean"


@register
class TrajectoryEntropy(TokenReduction):
    """Log-probability of the response: the one-sample estimate of the trajectory's negative entropy."""

    name = "trajectory_entropy"
    needs = frozenset({"logp"})
    statistic = "logp"
    formula = "mean|sum_t log p(y_t)"
    value_range = Range(-inf, 0)
    source = "EM-RL-sequence (arXiv 2505.15134, eq. 3: sum); URLVR (arXiv 2603.08660) Table 1: mean"


@register
class Probability(Reward[NoOptions]):
    """Probability of the whole response, not normalised by length. `[n]` float64.

    At .9 per token a thousand tokens have probability 1e-46, zero in float32: whole groups would lose their signal, or
    leave it to their shortest sample. Scores are float64, which reaches down to 5e-324; where the scale of a group does
    not matter, advantages are made of `exp(s - max s)` instead (`logs`). Metrics: `log`, the mean of s;
    `underflow`, scores that are zero in float64; `underflow_float32`, those that float32 would have lost.
    """

    name = "probability"
    needs = frozenset({"logp"})
    formula = "prod_t p(y_t) = exp(sum_t log p(y_t))"
    value_range = UNIT
    source = "RLSC (arXiv 2506.06395); URLVR (arXiv 2603.08660) Table 1"

    def score(self, group: Group) -> torch.Tensor:
        return self.score_groups([group])[0]

    def score_groups(self, groups: Sequence[Group]) -> list[torch.Tensor]:
        return [each.exp() for each in self.logs(groups)]

    def logs(self, groups: Sequence[Group]) -> list[torch.Tensor]:
        totals, _ = _sums(self, groups, "logp")
        return list(torch.split(totals, [len(group) for group in groups]))

    def counts(self, groups: Sequence[Group], scores: Sequence[torch.Tensor]) -> Sequence[Mapping[str, float]]:
        return [
            {
                "log": float(logs.mean()),
                "underflow": float((own == 0).double().mean()),
                "underflow_float32": float((logs < FLOAT32_ZERO).double().mean()),
            }
            for own, logs in zip(scores, self.logs(groups), strict=True)
        ]


class RentOptions(Section):
    malformed: float = -7.0
    """Reward of a response without a parsable answer; the released code gives an entropy of 7."""


@register
class Rent(Reward[RentOptions]):
    """RENT: negative mean token entropy, and a fixed low value for a response without a parsable answer. Metric:
    `malformed`."""

    name = "rent"
    needs = frozenset({"entropy", ANSWER})
    Options = RentOptions
    formula = "-mean_t H(p_t); malformed without a parsable answer"
    value_range = Range(-inf, inf, "[-log V, 0] and malformed")
    source = "RENT (arXiv 2505.22660) and its code, github.com/satrams/rent-rl"

    def score(self, group: Group) -> torch.Tensor:
        totals, lengths = _sums(self, [group], "entropy")
        malformed = torch.tensor([cls is None for cls in classes_of(self, group)])
        return torch.where(malformed, self.options.malformed, -totals / lengths)

    def counts(self, groups: Sequence[Group], scores: Sequence[torch.Tensor]) -> Sequence[Mapping[str, float]]:
        return [{"malformed": sum(cls is None for cls in group.classes) / len(group)} for group in groups]


class DisparityOptions(Section):
    no_answer: float = Field(default=0.0, ge=0, le=1)
    """Reward of a response without a parsable answer."""


@register
class ProbabilityDisparity(Reward[DisparityOptions]):
    """How far the first choice stands above the second at the tokens of the answer. Metric: `no_answer`."""

    name = "probability_disparity"
    needs = frozenset({"top2_gap"}) | SPAN_SIGNALS
    Options = DisparityOptions
    formula = "mean over the answer's tokens of p_(1) - p_(2)"
    value_range = UNIT
    source = "RLSF (arXiv 2507.21931); URLVR (arXiv 2603.08660) Table 1; CoT-decoding's gap (arXiv 2402.10200)"

    def score(self, group: Group) -> torch.Tensor:
        totals, lengths = _sums(self, [group], "top2_gap", "answer")
        return torch.where(lengths == 0, self.options.no_answer, totals / lengths.clamp(min=1))

    def counts(self, groups: Sequence[Group], scores: Sequence[torch.Tensor]) -> Sequence[Mapping[str, float]]:
        return [
            {"no_answer": sum(not mask.any() for mask in _masks(self, group, "answer")) / len(group)}
            for group in groups
        ]


def _masks(reward: Reward[Any], group: Group, span: Span) -> list[torch.Tensor]:
    return [token_mask(reward, group, place, span) for place in range(len(group))]


def _sums(
    reward: Reward[Any], groups: Sequence[Group], name: str, span: Span = "all"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the statistic `name` over each sample's tokens in `span`, and their number: `[N]` float64 each."""
    flat, lengths = statistics(reward, groups, name)
    counts = torch.tensor(lengths, dtype=torch.int64)
    kept = counts.double()
    if span != "all" and len(counts):
        mask = torch.cat([mask for group in groups for mask in _masks(reward, group, span)])
        kept = torch.segment_reduce(mask.double(), "sum", lengths=counts)
        flat = torch.where(mask, flat, 0.0)
    # float64 and one segment a sample: the sum does not depend on which samples stand beside it
    return torch.segment_reduce(flat, "sum", lengths=counts), kept
