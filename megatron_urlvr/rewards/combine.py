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
    scale_free: bool = False
    """Nothing that is made of the scores changes when those of one group are all multiplied by a positive number."""


@dataclass(frozen=True)
class RewardResult:
    """Rewards of one group. Tensors are `[n]` float64 on the CPU, so that small probabilities stay apart."""

    total: torch.Tensor
    """What advantages are made of: the proxy, scaled within the group where only ratios matter to them and its numbers
    may be too small."""
    proxy: torch.Tensor
    """The weighted sum of the terms."""
    by_term: dict[str, torch.Tensor]
    """Raw scores of each term, before normalising and weighting, by label."""
    counts: dict[str, float]
    """`<label>/<what>`: shares of the group in which something happened (underflow, ties, zero variance, ...)."""
    logs: torch.Tensor | None = None
    """Where `total` is scaled: natural logs of the only term's scores, `[n]`."""

    def among(self, places: Sequence[int]) -> torch.Tensor:
        """`total` of the samples at `places`, `[len(places)]`; scaled among them, so that a sample that is left out
        does not press the others below what numbers can tell apart."""
        if self.logs is None:
            return self.total[list(places)]
        weight = self.total[self.logs.argmax()]
        return weight * _relative(self.logs[list(places)])


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
        total, proxy = torch.zeros(2, sum(sizes), dtype=torch.float64)
        by_term: dict[str, list[torch.Tensor]] = {}
        counts: list[dict[str, float]] = [{} for _ in groups]
        logs: list[torch.Tensor] | None = None
        for term in self.terms:
            raw = term.reward.score_groups(groups)
            scores = scaled = _checked(term, groups, raw)
            logs = term.reward.logs(groups) if term.scale_free else None
            if logs is not None:
                scaled = _checked(term, groups, [_relative(each) for each in logs])
            if term.normalize:
                total += term.weight * (standard := _rowwise(standardise, scaled, sizes))
                proxy += term.weight * standard
            else:
                total += term.weight * scaled
                proxy += term.weight * scores
            by_term[term.label] = list(torch.split(scores, sizes))
            flat = _rowwise(zero_variance, scaled, sizes).tolist()
            for into, constant, more in zip(counts, flat, term.reward.counts(groups, raw), strict=True):
                into[f"{term.label}/zero_variance"] = float(constant)
                into.update({f"{term.label}/{name}": value for name, value in more.items()})
        alone = len(self.terms) == 1 and not self.terms[0].normalize
        return [
            RewardResult(
                total=piece,
                proxy=own,
                by_term={label: scores[i] for label, scores in by_term.items()},
                counts=counts[i],
                logs=logs[i] if logs is not None and alone else None,
            )
            for i, (piece, own) in enumerate(zip(torch.split(total, sizes), torch.split(proxy, sizes), strict=True))
        ]


def _relative(logs: torch.Tensor) -> torch.Tensor:
    """`exp(logs)` over the largest, `[n]`; the largest is 1."""
    return torch.exp(logs - logs.max()) if len(logs) else logs


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

    `advantage` and `kl_in_reward` (a KL penalty is taken from the total) tell whether the scale of a term's scores
    within a group matters to anything that follows. `seed` is the run's.
    """
    alone = len(section.terms) == 1 and get_advantage(advantage).scale_free and not kl_in_reward
    terms = []
    for label, term in section.terms.items():
        cls = get_reward(term.name)
        reward = cls(cls.Options(**term.options), seed=seed)
        free = term.normalize or alone
        terms.append(Term(label, reward, weight=term.weight, normalize=term.normalize, scale_free=free))
    return Combined(terms)


def missing_signals(combined: Combined, provided: frozenset[str]) -> list[str]:
    """Which signals nobody provides, a sentence for each reward and signal; empty when the run can start."""
    return [
        f"reward {term.reward.name!r} (reward.terms.{term.label}) needs the signal {signal!r}, which nothing in this "
        f"run provides; provided: {', '.join(sorted(provided)) or 'nothing'}"
        for term in combined.terms
        for signal in sorted(term.reward.needs - provided)
    ]
