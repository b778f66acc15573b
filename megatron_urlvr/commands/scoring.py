"""Rewards over evaluated samples, whatever the run trains on: which can be computed, and their scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_urlvr.config.errors import did_you_mean
from megatron_urlvr.config.reward import TermSection
from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.loop.assembly import Parts
from megatron_urlvr.loop.signals import locate_answers
from megatron_urlvr.policy.batch import Row
from megatron_urlvr.rewards.base import ANSWER, Reward
from megatron_urlvr.rewards.registry import available, get_reward
from megatron_urlvr.rewards.spans import SPAN_SIGNALS
from megatron_urlvr.types import STATISTICS, Group

AGGREGATION = "aggregation"
COMPUTED = STATISTICS | {ANSWER} | SPAN_SIGNALS
"""Signals that evaluation has."""


class Scorer:
    """Scores groups by several rewards, which have labels."""

    def __init__(self, parts: Parts, rewards: Mapping[str, Reward[Any]], *, temperature: float | None) -> None:
        self.parts, self.rewards, self.temperature = parts, rewards, temperature

    def __call__(self, groups: Sequence[Group]) -> list[dict[str, Any]]:
        """Of each group, by label: its `rewards` and the numbers that `order` its samples, `[n]` each, and the shares
        that each reward `counts`. One forward for all rewards. Collective within a replica."""
        needs = frozenset[str]().union(*(reward.needs for reward in self.rewards.values()))
        if wanted := needs & STATISTICS:
            samples = [(group, sample) for group in groups for sample in group.samples]
            rows = [Row(group.prompt.tokens, sample.tokens) for group, sample in samples]
            for (_, sample), stats in zip(
                samples, self.parts.policy.score(rows, wanted, temperature=self.temperature), strict=True
            ):
                sample.stats = stats
        if needs & SPAN_SIGNALS:
            locate_answers(groups, self.parts.grader_of, self.parts.signals.decode)
        found: list[dict[str, Any]] = [{"rewards": {}, "order": {}, "counts": {}} for _ in groups]
        for label, reward in self.rewards.items():
            scores = reward.score_groups(groups)
            order, counts = reward.logs(groups) or scores, reward.counts(groups, scores)
            for own, score, place, count in zip(found, scores, order, counts, strict=True):
                own["rewards"][label], own["order"][label] = score.tolist(), place.tolist()
                own["counts"][label] = dict(count)
        return found


def scorable(names: Sequence[str], terms: Mapping[str, TermSection], *, seed: int) -> dict[str, Reward[Any]]:
    """The rewards of `names`, by label: a term of the config, with its options, or a registered reward with its
    defaults; for `all` every label-free one that needs nothing but samples and what evaluation computes. UnusableInput
    for one that does not exist, reads labels or needs another signal."""
    if list(names) == ["all"]:
        names = [name for name in available() if not _obstacle(name)]
    found: dict[str, Reward[Any]] = {}
    for name in names:
        if name not in terms and name not in available():
            known = [*terms, *available()]
            raise UnusableInput(f"--reward {name}: there is no such reward.{did_you_mean(name, known)}")
        if problem := _obstacle(name) if name not in terms else _unscorable(_of_term(terms[name], seed)):
            raise UnusableInput(f"--reward {name}: {problem}.")
        found |= {name: _of_term(terms[name], seed)} if name in terms else dict(_with_defaults(name, seed))
    return found


def _of_term(term: TermSection, seed: int) -> Reward[Any]:
    cls = get_reward(term.name)
    return cls(cls.Options(**term.options), seed=seed)


def _obstacle(name: str) -> str:
    """Why a registered reward cannot be computed here; empty when it can."""
    cls = get_reward(name)
    if must := [k for k, field in cls.Options.model_fields.items() if field.is_required() and k != AGGREGATION]:
        return f"its option {must[0]!r} must be given: make it a term, reward.terms.LABEL, and name the label"
    return _unscorable(cls)


def _unscorable(reward: Reward[Any] | type[Reward[Any]]) -> str:
    """Why a reward cannot be computed here; empty when it can."""
    if reward.supervised:
        return "it reads labels, so that its agreement with them says nothing"
    if others := reward.needs - COMPUTED:
        return f"it needs the signal {sorted(others)[0]!r}, which evaluation does not compute"
    return ""


def _with_defaults(name: str, seed: int) -> Iterator[tuple[str, Reward[Any]]]:
    """The reward with its defaults, by label; with both ways to aggregate where one must be chosen."""
    cls = get_reward(name)
    field = cls.Options.model_fields.get(AGGREGATION)
    if field is None or not field.is_required():
        yield name, cls(cls.Options(), seed=seed)
        return
    for way in ("mean", "sum"):
        yield f"{name}_{way}", cls(cls.Options(**{AGGREGATION: way}), seed=seed)
