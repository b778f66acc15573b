"""Rewards from agreement between the samples of a group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf

import torch
from pydantic import Field

from megatron_urlvr.config.base import Section
from megatron_urlvr.types import Group

from .base import ANSWER, BINARY, UNIT, NoOptions, Range, Reward, classes_of, signal_of, statistics
from .registry import register
from .voting import shares_of, vote_of


@register
class MajorityVote(Reward[NoOptions]):
    """1 for the members of the winning class of answers. Membership decides, never a second grading against the
    winner; a group without a parsable answer gets 0. Metrics: `no_answer_groups`, `ties`."""

    name = "majority_vote"
    needs = frozenset({ANSWER})
    formula = "1[class(y) = most frequent class of the group]"
    value_range = BINARY
    source = "TTRL (arXiv 2504.16084); URLVR (arXiv 2603.08660) Table 2"

    def score(self, group: Group) -> torch.Tensor:
        classes = classes_of(self, group)
        winner = vote_of(group).winner
        return torch.tensor([float(winner is not None and cls == winner) for cls in classes])

    def counts(self, groups: Sequence[Group], scores: Sequence[torch.Tensor]) -> Sequence[Mapping[str, float]]:
        tied = [len(vote_of(group).tied) for group in groups]
        return [{"no_answer_groups": float(number == 0), "ties": float(number > 1)} for number in tied]


class SRTOptions(Section):
    soft: bool = True
    """Pay every answer its share of the votes; otherwise 1 for the winner, as `majority_vote` does."""
    threshold: float = Field(default=0.0, ge=0, le=1)
    """A group whose winner has a smaller share of the responses pays nobody."""


@register
class SRTVote(Reward[SRTOptions]):
    """Share of the group that gives the same answer, where the group agrees enough. Metric: `abstained`."""

    name = "srt_vote"
    needs = frozenset({ANSWER})
    Options = SRTOptions
    formula = "share of class(y), or 1[class(y) wins]; 0 where the winner's share < threshold"
    value_range = UNIT
    source = "SRT (arXiv 2505.21444) and its code, github.com/tajwarfahim/srt"

    def score(self, group: Group) -> torch.Tensor:
        classes = classes_of(self, group)
        outcome = vote_of(group)
        if outcome.winner is None or outcome.ratio < self.options.threshold:
            return torch.zeros(len(group), dtype=torch.float64)
        shares = shares_of(classes)
        worth = shares if self.options.soft else {outcome.winner: 1.0}
        return torch.tensor([0.0 if cls is None else worth.get(cls, 0.0) for cls in classes], dtype=torch.float64)

    def counts(self, groups: Sequence[Group], scores: Sequence[torch.Tensor]) -> Sequence[Mapping[str, float]]:
        return [{"abstained": float(not bool(own.any()))} for own in scores]


class SCRLOptions(Section):
    tau_pos: float = Field(default=0.5, ge=0, le=1)
    """Smallest share of the responses with which an answer is taken for right."""
    tau_marg: float = Field(default=0.15, ge=0, le=1)
    """Its share must exceed that of the second answer by more than this, if there is a second."""
    tau_low: float = Field(default=0.15, ge=0, le=1)
    """An answer with a smaller share is taken for wrong, if its responses are as uncertain as the group or more."""
    no_answer: float = -1.0
    """Reward of a response without a parsable answer."""


@register
class SCRLVote(Reward[SCRLOptions]):
    """+1 for a clear majority, -1 for rare answers given with high entropy, 0 for all else. Metrics: `abstained`
    (no answer was taken for right), `negative` (responses whose answer was taken for wrong)."""

    name = "scrl_vote"
    needs = frozenset({ANSWER, "entropy"})
    Options = SCRLOptions
    formula = (
        "+1 if share >= tau_pos and lead > tau_marg; -1 if share < tau_low and mean entropy of the class >= the "
        "group's; 0 else"
    )
    value_range = Range(-inf, inf, "{-1, 0, 1} and no_answer")
    source = "SCRL (arXiv 2603.19880), binary mode of its code, github.com/Jasper-Yan/SCRL"

    def score(self, group: Group) -> torch.Tensor:
        classes = classes_of(self, group)
        flat, lengths = statistics(self, [group], "entropy")
        entropy = torch.stack([piece.mean() for piece in torch.split(flat, lengths)])
        shares = shares_of(classes)
        worth = dict.fromkeys(shares, 0.0)
        for cls, share in shares.items():
            own = entropy[torch.tensor([other == cls for other in classes])].mean()
            if share < self.options.tau_low and float(own) >= float(entropy.mean()):
                worth[cls] = -1.0
        winner = vote_of(group).winner
        if winner is not None and self._clear(Counter(cls for cls in classes if cls is not None), len(classes)):
            worth[winner] = 1.0
        return torch.tensor([self.options.no_answer if cls is None else worth[cls] for cls in classes])

    def _clear(self, votes: Counter[int], n: int) -> bool:
        """Whether the first of the answers with so many `votes` of `n` samples is a consensus."""
        first, *others = sorted(votes.values(), reverse=True)
        lead = (first - others[0]) / n if others else inf  # a difference of shares would be off by rounding
        return first / n >= self.options.tau_pos and lead > self.options.tau_marg

    def counts(self, groups: Sequence[Group], scores: Sequence[torch.Tensor]) -> Sequence[Mapping[str, float]]:
        return [
            {
                "abstained": float(not bool((own > 0).any())),
                "negative": sum(
                    float(value) < 0 and cls is not None for value, cls in zip(own, group.classes, strict=True)
                )
                / len(group),
            }
            for group, own in zip(groups, scores, strict=True)
        ]


class GatedOptions(Section):
    push_down: float = Field(default=1.0, ge=0)
    """c: how hard an unconfirmed majority is pushed down, relative to its share."""


CHECK = "check"
"""Signal: 1 where a check confirms the answer, `[n]` float32; from providers (`checker`, `unit_tests`)."""


@register
class GatedVote(Reward[GatedOptions]):
    """The vote's reward where a check confirms the winning answer; else the unconfirmed majority is dropped, and a
    zero-mean residual prefers those of the other answers that others give too. Metric: `confirmed`.

    With a the majority's share and u_i the share of the *other* dissenters that agree with dissenter i, the residual is
    a (u_i - mean u) for dissenters and -c a for the majority, plus c a^2 for all, so that it sums to zero. A response
    without a parsable answer is a dissenter that nobody agrees with.
    """

    name = "gated_vote"
    needs = frozenset({ANSWER, CHECK})
    Options = GatedOptions
    formula = "confirmed: 1[class(y) wins]; else: -c a 1[class(y) wins] + a (u_y - mean u) 1[it does not] + c a^2"
    value_range = Range(-inf, inf, "confirmed: {0, 1}; else: [-(1 + c), 1 + c], mean 0")
    source = "JURY-RL (arXiv 2604.25419), whose ResZero is written here from its description"

    def score(self, group: Group) -> torch.Tensor:
        classes = classes_of(self, group)
        outcome = vote_of(group)
        if outcome.winner is None:
            return torch.zeros(len(group), dtype=torch.float64)
        wins = torch.tensor([cls == outcome.winner for cls in classes])
        if confirmed(self, group, outcome.winner):
            return wins.double()
        rest = [cls for cls, won in zip(classes, wins.tolist(), strict=True) if not won]
        others = max(len(rest) - 1, 1)
        support = torch.tensor([0.0 if c is None else (rest.count(c) - 1) / others for c in rest], dtype=torch.float64)
        scores = torch.full((len(group),), -self.options.push_down * outcome.ratio, dtype=torch.float64)
        if rest:
            scores[~wins] = outcome.ratio * (support - support.mean())
        return scores + self.options.push_down * outcome.ratio**2

    def counts(self, groups: Sequence[Group], scores: Sequence[torch.Tensor]) -> Sequence[Mapping[str, float]]:
        winners = [vote_of(group).winner for group in groups]
        return [
            {"confirmed": float(winner is not None and confirmed(self, group, winner))}
            for group, winner in zip(groups, winners, strict=True)
        ]


def confirmed(reward: GatedVote, group: Group, cls: int) -> bool:
    """Whether the check confirms any response of the class `cls`: they all have one answer."""
    checks = signal_of(reward, group, CHECK).tolist()
    return any(check > 0.5 and own == cls for check, own in zip(checks, group.classes, strict=True))


@register
class AntiMajority(Reward[NoOptions]):
    """1 for a parsable answer that is not the group's most frequent one: the control that pays dissent."""

    name = "anti_majority"
    needs = frozenset({ANSWER})
    formula = "1[y has an answer, and class(y) is not the most frequent class]"
    value_range = BINARY
    source = "control"

    def score(self, group: Group) -> torch.Tensor:
        winner = vote_of(group).winner
        return torch.tensor([float(cls is not None and cls != winner) for cls in classes_of(self, group)])
