"""What a step's rollouts say about the policy (without labels) and about its proxy reward (with labels).

Truth is used here and never reaches the reward: the audit compares the two after the fact. Every metric is a ratio of
two sums over groups. Sums of several processes add up (`merge`), and `rates` divides once at the end, so that a metric
does not depend on how groups were spread. A group is judged by itself: neither the order of groups nor a prompt that is
in the batch twice can mix anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from megatron_urlvr.algorithms.advantages import STD_EPS
from megatron_urlvr.algorithms.ranking import auroc
from megatron_urlvr.rewards.combine import RewardResult
from megatron_urlvr.rewards.judge import JUDGE, UNPARSABLE
from megatron_urlvr.rewards.voting import Vote, vote_of
from megatron_urlvr.types import Group

Sums = dict[str, tuple[float, float]]
"""Metric name -> (numerator, denominator)."""

ZERO_WITHOUT_CASES = frozenset({"audit/vote/precision", "audit/vote/recall"})
"""0 when nothing was rewarded (right): no answer at all must not look like perfect answers. Other metrics without a
case are left out."""
JUDGE_RATES = ("audit/judge/yes_if_right", "audit/judge/no_if_wrong")
"""Their mean is the judge's balanced accuracy."""


def merge(parts: Iterable[Mapping[str, tuple[float, float]]]) -> Sums:
    """Sums of several parts of a batch, or of several processes."""
    total: Sums = {}
    for part in parts:
        for name, (top, bottom) in part.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = (before[0] + top, before[1] + bottom)
    return total


def rates(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Metrics from their sums."""
    out = {}
    for name, (top, bottom) in sums.items():
        if bottom > 0:
            out[name] = top / bottom
        elif name in ZERO_WITHOUT_CASES:
            out[name] = 0.0
    if all(name in out for name in JUDGE_RATES):
        out["audit/judge/balanced_accuracy"] = sum(out[name] for name in JUDGE_RATES) / len(JUDGE_RATES)
    return out


def audit(
    groups: Sequence[Group], rewards: Sequence[torch.Tensor], correct: Sequence[torch.Tensor | None]
) -> dict[str, float]:
    """Audit of one batch in one process; see `audit_sums`."""
    return rates(audit_sums(groups, rewards, correct))


def audit_sums(
    groups: Sequence[Group], rewards: Sequence[torch.Tensor], correct: Sequence[torch.Tensor | None]
) -> Sums:
    """Compare vote and proxy reward with the truth.

    `rewards`: the proxy of each group's samples, `[n]`; `correct`: whether each answer is right, `[n]` bool, or None
    where a prompt has no label. A shadow vote is taken whatever the reward is. ValueError if lengths differ.

    - `audit/vote/reward_accuracy`: samples whose vote reward equals the true one (TTRL's "reward accuracy"). It goes to
      1 when nothing can be parsed any more, because then both are 0; `precision` shows that collapse.
    - `audit/vote/precision`: right given rewarded by the vote, 0 if none is; `audit/vote/recall`: the other way round
    - `audit/vote/label_accuracy`: groups whose winning answer is right; of k tied answers each counts 1/k
    - `audit/accuracy`: right samples; `audit/no_label`: groups without a label, which are left out of all the rest
    - `audit/top_sample_accuracy`: the sample with the highest proxy is right; k tied ones count 1/k each
    - `audit/auroc`: mean over groups of the chance that the proxy ranks a right sample above a wrong one, ties 1/2;
      `audit/auroc_left_out`: share of groups with only right or only wrong samples, which have no such pair
    - with a judge, `audit/judge/yes_if_right`: its share of yes over right samples; `audit/judge/no_if_wrong`: of no
      over wrong ones; no verdict counts against it in both; `audit/judge/balanced_accuracy`: their mean
    """
    parts = []
    for group, reward, right in zip(groups, rewards, correct, strict=True):
        if right is None:
            parts.append({"audit/no_label": (1.0, 1.0)})
            continue
        _same_length(group, reward, "rewards")
        _same_length(group, right, "truths")
        parts.append(_audit_group(group, reward.double().tolist(), right.bool().tolist()))
    return merge(parts)


def _audit_group(group: Group, proxy: list[float], right: list[bool]) -> Sums:
    outcome = vote_of(group)
    rewarded = [cls is not None and cls == outcome.winner for cls in group.classes]
    hits = sum(a and b for a, b in zip(rewarded, right, strict=True))
    best = max(proxy)
    ranking = auroc(proxy, right)
    n = float(len(group))
    return {
        "audit/no_label": (0.0, 1.0),
        "audit/vote/reward_accuracy": (float(sum(a == b for a, b in zip(rewarded, right, strict=True))), n),
        "audit/vote/precision": (float(hits), float(sum(rewarded))),
        "audit/vote/recall": (float(hits), float(sum(right))),
        "audit/vote/label_accuracy": (_winner_right(group, outcome, right), 1.0),
        "audit/accuracy": (float(sum(right)), n),
        "audit/top_sample_accuracy": (_mean([r for p, r in zip(proxy, right, strict=True) if p == best]), 1.0),
        "audit/auroc": (0.0, 0.0) if ranking is None else (ranking, 1.0),
        "audit/auroc_left_out": (float(ranking is None), 1.0),
        **_audit_judge(group, right),
    }


def _audit_judge(group: Group, right: list[bool]) -> Sums:
    if JUDGE not in group.signals or UNPARSABLE not in group.signals:
        return {}
    yes, none = group.signals[JUDGE].tolist(), group.signals[UNPARSABLE].tolist()
    granted = [y for y, truth in zip(yes, right, strict=True) if truth]
    refused = [1.0 - y - u for y, u, truth in zip(yes, none, right, strict=True) if not truth]
    found = zip(JUDGE_RATES, (granted, refused), strict=True)
    return {name: (float(sum(values)), float(len(values))) for name, values in found}


def _winner_right(group: Group, outcome: Vote, right: list[bool]) -> float:
    """Share of the tied winning classes whose answer is right; 0 when nothing was parsed."""
    of_class = {cls: _mean([r for c, r in zip(group.classes, right, strict=True) if c == cls]) for cls in outcome.tied}
    return _mean(list(of_class.values()))


def rollout_metrics(groups: Sequence[Group], rewards: Sequence[torch.Tensor]) -> dict[str, float]:
    """Label-free metrics of one batch in one process; see `rollout_sums`."""
    return rates(rollout_sums(groups, rewards))


def rollout_sums(
    groups: Sequence[Group], rewards: Sequence[torch.Tensor], scaled: Sequence[torch.Tensor] | None = None
) -> Sums:
    """What can be said without labels. `rewards`: the proxy of each group's samples, `[n]`; `scaled`: what advantages
    are made of, where it is not the proxy (`RewardResult.total`).

    - `reward/proxy`: mean over samples; `reward/proxy_std`: mean over groups of the deviation within a group
    - `reward/zero_variance`: groups whose samples all have the same reward, which teach nothing
    - `vote/majority_ratio`: mean over groups of the winner's share, unparsable answers in the denominator;
      `vote/no_answer_groups`: groups without a parsable answer; `vote/ties`: groups with several winners
    - `answers/unique`: mean over groups of the number of different answers
    - `response/length` (tokens), `response/truncated` (ended by the limit), `response/no_answer`: over samples
    - `policy/entropy`: mean over tokens, nats, when the statistics are there (the policy's, the caller sees to it);
      `policy/sampled_entropy`: its estimate `-log p` from the engine's log-probabilities, when those are there
    """
    parts = []
    for group, reward, told in zip(groups, rewards, scaled or rewards, strict=True):
        _same_length(group, reward, "rewards")
        parts.append(_rollout_group(group, reward.detach().double(), told.detach().double()))
    return merge(parts)


def _rollout_group(group: Group, reward: torch.Tensor, scaled: torch.Tensor) -> Sums:
    outcome = vote_of(group)
    samples = group.samples
    n = float(len(samples))
    deviation, told = (float(each.std()) if len(samples) > 1 else 0.0 for each in (reward, scaled))
    sums: Sums = {
        "reward/proxy": (float(reward.sum()), n),
        "reward/proxy_std": (deviation, 1.0),
        "reward/zero_variance": (float(told < STD_EPS), 1.0),
        "vote/majority_ratio": (outcome.ratio, 1.0),
        "vote/no_answer_groups": (float(outcome.winner is None), 1.0),
        "vote/ties": (float(len(outcome.tied) > 1), 1.0),
        "answers/unique": (float(len({cls for cls in group.classes if cls is not None})), 1.0),
        "response/length": (float(sum(s.length for s in samples)), n),
        "response/truncated": (float(sum(s.finish == "length" for s in samples)), n),
        "response/no_answer": (float(sum(cls is None for cls in group.classes)), n),
    }
    if (entropies := _all_present([s.stats.entropy if s.stats else None for s in samples])) is not None:
        sums["policy/entropy"] = _token_sums(entropies)
    if (logps := _all_present([s.logp for s in samples])) is not None:
        total, tokens = _token_sums(logps)
        sums["policy/sampled_entropy"] = (-total, tokens)
    return sums


def term_sums(groups: Sequence[Group], results: Sequence[RewardResult]) -> Sums:
    """Metrics of the single reward terms: `term/<label>`, its raw mean over samples, and `term/<label>/<what>`, the
    mean over groups of what it counted."""
    parts: list[Sums] = []
    for group, result in zip(groups, results, strict=True):
        parts.append({f"term/{label}": (float(s.sum()), float(len(group))) for label, s in result.by_term.items()})
        parts.append({f"term/{name}": (value, 1.0) for name, value in result.counts.items()})
    return merge(parts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _all_present(values: list[torch.Tensor | None]) -> list[torch.Tensor] | None:
    present = [value for value in values if value is not None]
    return present if present and len(present) == len(values) else None


def _token_sums(values: list[torch.Tensor]) -> tuple[float, float]:
    flat = torch.cat(values)
    return float(flat.detach().sum(dtype=torch.float64)), float(flat.numel())


def _same_length(group: Group, values: torch.Tensor, what: str) -> None:
    if values.shape != (len(group.samples),) or len(group.classes) != len(group.samples):
        raise ValueError(
            f"prompt {group.prompt.id!r} has {len(group.samples)} samples, {len(group.classes)} graded answers and "
            f"{what} of shape {tuple(values.shape)}; the audit needs one of each a sample, in the group's order"
        )
