"""From groups to what the policy is given: scored tokens, advantages, rows and mini-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from ..algorithms.advantages import entropy_scaled, zero_variance
from ..algorithms.covariance import held_tokens
from ..algorithms.kl import k3, reward_penalty
from ..algorithms.losses import token_weights
from ..config.algorithm import KLCovSection
from ..config.root import Config
from ..distributed.exchange import any_rank, derive_seed, gather_from_leaders, merge_sums
from ..distributed.layout import Layout
from ..monitor.audit import Sums, rates
from ..policy.batch import Row
from ..rewards.base import LABEL, PERMUTED_LABEL, NonFiniteScoreError
from ..rewards.combine import RewardResult
from ..rollout.choice import choose
from ..rollout.filters import select
from ..types import STATISTICS, Group, Sample, samples_of
from .assembly import Parts
from .off_policy import behaviour_logp, correction_metrics, own_logp, prepare, wants_own


def score_groups(config: Config, parts: Parts, groups: Sequence[Group], *, trained: bool = False) -> None:
    """Give every sample the statistics that the rewards need; no forward at all when none is needed, or when the
    servers gave them. `trained`: the groups are trained on, and the update may want log-probs from the same pass."""
    wanted = parts.reward.needs & STATISTICS
    if trained and config.algorithm.entropy_scaling:
        wanted |= {"entropy"}
    if not wanted or config.reward.statistics == "servers":
        return
    if trained and wants_own(config):
        wanted |= {"logp"}
    samples = [(group, sample) for group in groups for sample in group.samples]
    rows = [Row(group.prompt.tokens, sample.tokens) for group, sample in samples]
    temperature = config.reward.temperature
    found = parts.policy.score(
        rows, wanted, config.reward.judge, temperature=None if temperature == "rollout" else temperature
    )
    for (_, sample), stats in zip(samples, found, strict=True):
        sample.stats = stats


def reward_groups(parts: Parts, groups: Sequence[Group], *, use: str = "reward") -> list[RewardResult]:
    """Rewards of `groups`, once providers have filled in what they need. Supervised ones alone are told which answers
    are right: a use of labels named `use`.

    NonFiniteScoreError on every rank when a reward of any replica is not finite.
    """
    parts.signals.fetch(groups)
    if PERMUTED_LABEL in parts.reward.needs:
        for group in groups:
            if (right := parts.permuted_correctness(group, use=use)) is not None:
                group.signals[PERMUTED_LABEL] = right.float()
    if LABEL in parts.reward.needs:
        for group in groups:
            if (right := parts.correctness(group, use=use)) is not None:
                group.signals["correct"] = right.float()
    results, problem = list[RewardResult](), ""
    try:
        results = parts.reward.score_groups(groups)
    except NonFiniteScoreError as error:
        problem = str(error)
    if any_rank(bool(problem), parts.layout):
        raise NonFiniteScoreError(problem or "a reward of another replica is not finite")
    return results


def training_rows(
    config: Config, parts: Parts, groups: Sequence[Group], results: Sequence[RewardResult]
) -> list[list[Row]]:
    """The rows of each group's trained samples with their advantages, and after them those of the lessons beside it.

    `results`: the rewards of all votes of each group. A provider's lessons have advantages of their own.
    """
    chosen = [_trained_votes(config, group) for group in groups]
    trained = [Group(g.prompt, [g.samples[k] for k in places]) for g, places in zip(groups, chosen, strict=True)]
    kept = torch.zeros(0, config.rollout.trained)
    if groups:
        kept = torch.stack([result.among(places) for result, places in zip(results, chosen, strict=True)])
    rows = _rows(config, parts, trained, kept, own=own_logp(config, parts, samples_of(trained)))
    for lessons in parts.signals.lessons(groups).values():
        taught = [lesson for each in lessons for lesson in each]
        given = torch.stack([lesson.rewards for lesson in taught]) if taught else torch.zeros(0, 2)
        more = iter(_rows(config, parts, [lesson.group for lesson in taught], given, own=None))
        for members, each in zip(rows, lessons, strict=True):
            members += [row for _ in each for row in next(more)]
    return rows


def _rows(
    config: Config, parts: Parts, groups: Sequence[Group], kept: torch.Tensor, *, own: list[torch.Tensor] | None
) -> list[list[Row]]:
    """The rows of each group's samples, with advantages from their rewards `kept: [G, n]`. Every replica takes part,
    also one without groups.

    Log-probs of the behaviour policy are attached only when the rollouts serve more than one optimizer step, or
    `algorithm.correction` wants them; strictly on-policy, the update's own forward gives them. `own`: the trainer's,
    where they are there already.
    """
    kl = config.algorithm.kl
    rows = [[Row(group.prompt.tokens, sample.tokens) for sample in group.samples] for group in groups]
    flat = [row for members in rows for row in members]
    samples = samples_of(groups)
    reference = []
    if kl.coef > 0:
        found = parts.policy.score(flat, frozenset({"logp"}), "ema" if kl.reference == "ema" else "reference")
        reference = [stats.get("logp") for stats in found]
        if kl.place == "reward":
            penalty = reward_penalty([behaviour_logp(sample) for sample in samples], reference, kl.estimator)
            kept = kept - kl.coef * penalty.view(kept.shape)
    if own is None and wants_own(config):
        own = [stats.get("logp") for stats in parts.policy.score(flat, frozenset({"logp"}))]
    prepare(config, flat, samples, own)
    estimated = parts.advantage(kept, lambda values: replica_total(values, parts.layout))
    if config.algorithm.entropy_scaling and groups:
        entropies = torch.stack([_mean_entropy(sample) for sample in samples])
        estimated = entropy_scaled(estimated, entropies.view(estimated.shape))
    advantages = estimated.reshape(-1).tolist()
    coefficients = parts.loss.coefficients(advantages, [behaviour_logp(sample) for sample in samples])
    for i, row in enumerate(flat):
        row.advantage = coefficients[i]
        if reference and parts.loss.needs_reference:
            row.ref_logp = reference[i]
    return rows


def rows_to_train_on(
    config: Config, parts: Parts, groups: list[Group], results: list[RewardResult]
) -> tuple[list[list[Row]], dict[str, float]]:
    """Rows to train on, group by group, and the metrics of how they were chosen, taught besides and corrected."""
    trained, results, metrics = select_groups(config, parts, groups, results)
    rows = training_rows(config, parts, trained, results)
    metrics |= lesson_metrics(parts, trained)
    return rows, metrics | correction_metrics(config, [row for each in rows for row in each], parts.layout)


def lesson_metrics(parts: Parts, groups: Sequence[Group]) -> dict[str, float]:
    """Of the lessons beside `groups`, over all replicas, by the provider's label: `lesson/<label>/reward`, their mean
    reward; `.../zero_variance`, the share whose samples all have one reward; `.../per_prompt`, how many there are."""
    sums: Sums = {}
    for label, lessons in parts.signals.lessons(groups).items():
        rewards = [lesson.rewards.double() for each in lessons for lesson in each]
        flat = float(sum(bool(zero_variance(own[None])) for own in rewards))
        sums |= {
            f"lesson/{label}/reward": (float(sum(own.mean() for own in rewards)), float(len(rewards))),
            f"lesson/{label}/zero_variance": (flat, float(len(rewards))),
            f"lesson/{label}/per_prompt": (float(len(rewards)), float(len(groups))),
        }
    return rates(merge_sums(sums, parts.layout)) if sums else {}


def _mean_entropy(sample: Sample) -> torch.Tensor:
    """Mean token entropy of a response, nats; a float64 scalar."""
    assert sample.stats is not None, "score_groups computes the entropies"
    return sample.stats.get("entropy").double().mean()


def replica_total(values: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Sum of `values` over the data-parallel replicas, each counted once; collective."""
    if layout.dp == 1:
        return values
    own = values.clone() if layout.is_leader else torch.zeros_like(values)
    dist.all_reduce(own, group=layout.control)
    return own


def _trained_votes(config: Config, group: Group) -> list[int]:
    """Places of the votes of `group` that are trained on, the same on every rank."""
    rollout = config.rollout
    seed = derive_seed(config.run.seed, "train_on", group.prompt.id, group.samples[0].version)
    return choose(group.classes, rollout.trained, rollout.train_on, seed)


def select_groups(
    config: Config, parts: Parts, groups: list[Group], results: list[RewardResult]
) -> tuple[list[Group], list[RewardResult], dict[str, float]]:
    """The groups that are trained on and their rewards, under `rollout.filter`, and `filter/...`: shares of all
    sampled groups. Each replica fills its own part of the step."""
    if parts.filter is None:
        return groups, results, {}
    totals = [result.total for result in results]
    chosen = select(parts.filter, groups, totals, config.rollout.prompts // parts.layout.dp)
    sums = {f"filter/{name}": (count, 0.0) for name, count in chosen.counts.items()}
    total = merge_sums(sums | {"groups": (float(len(groups)), 0.0)}, parts.layout)
    number = total.pop("groups")[0]
    metrics = {name: count / number for name, (count, _) in total.items()}
    return [groups[k] for k in chosen.kept], [results[k] for k in chosen.kept], metrics


def mini_batches(config: Config, layout: Layout, groups: Sequence[Sequence[Row]]) -> Iterator[list[Row]]:
    """This replica's rows of each mini-batch, in order, epoch after epoch, weighted for the global loss.

    The totals behind the weights are summed over replicas before the mini-batch's first forward.
    """
    per_replica = (config.algorithm.mini_batch or config.rollout.prompts) // layout.dp
    for _ in range(config.algorithm.epochs):
        for start in range(0, len(groups), max(per_replica, 1)):
            rows = [row for members in groups[start : start + per_replica] for row in members]
            weigh(rows, config, layout)
            if isinstance(config.algorithm.loss, KLCovSection):
                hold(rows, config.algorithm.loss, layout)
            yield rows


def hold(rows: Sequence[Row], loss: KLCovSection, layout: Layout) -> None:
    """Mark the tokens of a mini-batch that KL-Cov holds. Every replica takes part."""
    given = [row.old_logp for row in rows if row.old_logp is not None]
    advantages = [torch.full((len(row.response),), row.advantage) for row in rows]
    held = held_tokens(
        torch.cat(given) if given else torch.zeros(0),
        torch.cat(advantages) if advantages else torch.zeros(0),
        loss.share,
        total=lambda values: replica_total(values, layout),
        gather=lambda values: gather_from_leaders(values, layout),
    )
    for row, own in zip(rows, held.split([len(row.response) for row in rows]), strict=True):
        row.held = own


def weigh(rows: Sequence[Row], config: Config, layout: Layout) -> None:
    """Set every row's token weights under `algorithm.loss.aggregation`."""
    lengths = torch.tensor([len(row.response) for row in rows], dtype=torch.int64)
    totals = torch.tensor([int(lengths.sum()), len(rows)])
    if layout.dp > 1:
        if not layout.is_leader:
            totals.zero_()
        dist.all_reduce(totals, group=layout.control)
    weights = token_weights(
        lengths,
        config.algorithm.loss.aggregation,
        total_tokens=int(totals[0]),
        total_sequences=int(totals[1]),
        max_new_tokens=config.rollout.max_new_tokens,
    )
    for row, part in zip(rows, weights.split(lengths.tolist()), strict=True):
        row.weight = part


def divergence_from_start(parts: Parts, groups: Sequence[Group]) -> Sums:
    """Sums of `kl/start`: the k3 estimate of KL(policy || start) per token, over this step's samples. One forward."""
    rows = [Row(group.prompt.tokens, sample.tokens) for group in groups for sample in group.samples]
    start = parts.policy.score(rows, frozenset({"logp"}), "reference")
    now = [behaviour_logp(sample) for group in groups for sample in group.samples]
    each = [k3(a, stats.get("logp")) for a, stats in zip(now, start, strict=True)]
    return {"kl/start": (float(sum(x.double().sum() for x in each)), float(sum(len(x) for x in each)))}
