"""Rewards from agreement between the samples of a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_urlvr.types import Group

from .base import ANSWER, NoOptions, Reward, classes_of
from .registry import register
from .voting import vote_of


@register
class MajorityVote(Reward[NoOptions]):
    """1 for the members of the winning class of answers. Membership decides, never a second grading against the
    winner; a group without a parsable answer gets 0. Metrics: `no_answer_groups`, `ties`."""

    name = "majority_vote"
    needs = frozenset({ANSWER})
    formula = "1[class(y) = most frequent class of the group]"
    value_range = "{0, 1}"
    source = "TTRL (arXiv 2504.16084); URLVR (arXiv 2603.08660) Table 2"

    def score(self, group: Group) -> torch.Tensor:
        classes = classes_of(self, group)
        winner = vote_of(group).winner
        return torch.tensor([float(winner is not None and cls == winner) for cls in classes])

    def counts(self, groups: Sequence[Group], scores: Sequence[torch.Tensor]) -> Sequence[Mapping[str, float]]:
        tied = [len(vote_of(group).tied) for group in groups]
        return [{"no_answer_groups": float(number == 0), "ties": float(number > 1)} for number in tied]
