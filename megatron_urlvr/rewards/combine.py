"""The proxy reward of a run: a weighted sum of terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_urlvr.algorithms.advantages import get_advantage, standardise, zero_variance
from megatron_urlvr.config.reward import RewardSection
from megatron_urlvr.types import Group, samples_of

from .base import NonFiniteScoreError, Reward
from .registry import get_reward


@dataclass(frozen=True)
class Term:
    """One reward with its place in the sum."""

    label: str
    """Key of the term in the config."""
    reward: Reward[Any]
    weight: float
    normalize: bool
    """Standardise the scores within each group before weighting."""


@dataclass(frozen=True)
class RewardResult:
    """Rewards of one group. Tensors are `[n]` float64 on the CPU, so that small probabilities stay apart."""

    total: torch.Tensor
    by_term: dict[str, torch.Tensor]
    """Raw scores of each term, before normalising and weighting, by label."""
    counts: dict[str, float]
    """`<label>/<what>`: shares of the group in which something happened (underflow, ties, zero variance, ...)."""


class Combined:
    """All terms of a run."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = tuple(terms)
        self.needs: frozenset[str] = frozenset().union(*(term.reward.needs for term in terms))
        self.supervised = any(term.reward.supervised for term in terms)

    def score(self, group: Group) -> RewardResult:
        """Rewards of one group. MissingSignalError or NonFiniteScoreError, naming reward, prompt and sample."""
        return self.score_groups([group])[0]

    def score_groups(self, groups: Sequence[Group]) -> list[RewardResult]:
        """Rewards of each group; faster than one at a time."""
        if not groups:
            return []
        sizes = [len(group) for group in groups]
        total = torch.zeros(sum(sizes), dtype=torch.float64)
        by_term: dict[str, list[torch.Tensor]] = {}
        counts: list[dict[str, float]] = [{} for _ in groups]
        for term in self.terms:
            raw = term.reward.score_groups(groups)
            scores = _checked(term, groups, raw)
            total += term.weight * (_rowwise(standardise, scores, sizes) if term.normalize else scores)
            by_term[term.label] = list(torch.split(scores, sizes))
            flat = _rowwise(zero_variance, scores, sizes).tolist()
            for into, constant, more in zip(counts, flat, term.reward.counts(groups, raw), strict=True):
                into[f"{term.label}/zero_variance"] = float(constant)
                into.update({f"{term.label}/{name}": value for name, value in more.items()})
        return [
            RewardResult(piece, {label: scores[i] for label, scores in by_term.items()}, counts[i])
            for i, piece in enumerate(torch.split(total, sizes))
        ]


def _rowwise(function: Callable[[torch.Tensor], torch.Tensor], flat: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """`function` of each group's part of `flat`, its results laid end to end; in one call where sizes are equal."""
    if len(set(sizes)) == 1:
        return function(flat.view(len(sizes), sizes[0])).reshape(-1)
    return torch.cat([function(piece[None]).reshape(-1) for piece in torch.split(flat, sizes)])


def _checked(term: Term, groups: Sequence[Group], raw: Sequence[torch.Tensor]) -> torch.Tensor:
    """The scores of all samples laid end to end, float64 on the CPU. TypeError if a group's have another shape,
    NonFiniteScoreError if one is not finite."""
    for group, scores in zip(groups, raw, strict=True):
        if scores.shape != (len(group),):
            raise TypeError(
                f"reward {term.reward.name!r} (term {term.label!r}) returned shape {tuple(scores.shape)} for prompt "
                f"{group.prompt.id!r}; it must be one score for each of its {len(group)} samples"
            )
    flat = torch.cat([scores.detach().to("cpu", torch.float64) for scores in raw])
    if len(bad := (~flat.isfinite()).nonzero()):
        place = int(bad[0])
        sample = samples_of(groups)[place]
        raise NonFiniteScoreError(
            f"reward {term.reward.name!r} (term {term.label!r}) is {float(flat[place])} for sample {sample.index} of "
            f"prompt {sample.prompt_id!r}; a reward must be finite, look at the signals it is made of"
        )
    return flat


def build_terms(section: RewardSection, *, advantage: str, seed: int, kl_in_reward: bool = False) -> Combined:
    """The terms of `section`, whose names and options the section has checked.

    `advantage` and `kl_in_reward` (a KL penalty is taken from the total) tell each reward whether the scale of its
    scores within a group matters to anything that follows. `seed` is the run's.
    """
    alone = len(section.terms) == 1 and get_advantage(advantage).scale_free and not kl_in_reward
    terms = []
    for label, term in section.terms.items():
        cls = get_reward(term.name)
        reward = cls(cls.Options(**term.options), seed=seed, scale_free=term.normalize or alone)
        terms.append(Term(label=label, reward=reward, weight=term.weight, normalize=term.normalize))
    return Combined(terms)


def missing_signals(combined: Combined, provided: frozenset[str]) -> list[str]:
    """Which signals nobody provides, a sentence for each reward and signal; empty when the run can start."""
    return [
        f"reward {term.reward.name!r} (reward.terms.{term.label}) needs the signal {signal!r}, which nothing in this "
        f"run provides; provided: {', '.join(sorted(provided)) or 'nothing'}"
        for term in combined.terms
        for signal in sorted(term.reward.needs - provided)
    ]
