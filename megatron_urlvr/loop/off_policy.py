"""The trainer's statistics beside the engine's: off-policy weights of trained tokens, and how far the two are apart.

For label-free rewards the difference does not stay in the importance ratio: where a reward is made of log-probs, it is
in the reward itself. Both are measured here, on every token the trainer scores anyway, else on a few groups a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch

from ..algorithms.corrections import Mismatch, log_ratios, mismatch, weight_totals, weights
from ..config.root import Config
from ..distributed.exchange import gather_from_leaders, merge_sums
from ..distributed.layout import Layout
from ..monitor.audit import Sums, merge, rates
from ..policy.batch import Row
from ..types import STATISTICS, Group, Sample, TokenStats, samples_of
from .assembly import Parts

MAXIMA = ("mismatch/reward_max_diff", "rollout/stats_max_diff")
"""Metrics of which replicas' largest counts."""


def prepare(config: Config, rows: Sequence[Row], samples: Sequence[Sample], own: Sequence[torch.Tensor] | None) -> None:
    """Give the rows what `algorithm.correction` asks for. `own`: the trainer's log-probs of each response before the
    step's first update, where `wants_own` says that they are needed. ValueError for a response without log-probs."""
    section = config.algorithm.correction
    for k, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        if ratio_to_rollout(config):
            row.old_logp = behaviour_logp(sample)
        elif own is not None:
            row.old_logp = own[k] if config.updates_per_step > 1 else None
            if section.method != "none":
                row.correction = weights(log_ratios(own[k], behaviour_logp(sample)), section)


def wants_own(config: Config) -> bool:
    """Whether the trainer's log-probs are needed before the first update. With one update on its own samples the
    update's forward gives them."""
    corrected = config.algorithm.correction.method != "none"
    return corrected or (config.updates_per_step > 1 and not ratio_to_rollout(config))


def ratio_to_rollout(config: Config) -> bool:
    """Whether the loss's ratio is taken against the log-probs that came with the rollouts."""
    return config.algorithm.correction.old_logp == "rollout"


def correction_metrics(config: Config, rows: Sequence[Row], layout: Layout) -> dict[str, float]:
    """Means of the weights over all replicas' trained tokens; nothing where nothing is corrected."""
    if config.algorithm.correction.method == "none":
        return {}
    found = [row.correction for row in rows if row.correction is not None]
    return rates(merge_sums(weight_totals(found, config.algorithm.correction), layout))


def behaviour_logp(sample: Sample) -> torch.Tensor:
    """`[T]` float32 log-probs as sampled, from the engine; ValueError when it gave none."""
    if sample.logp is None:
        raise ValueError(f"sample {sample.index} of prompt {sample.prompt_id!r} came without log-probs from the engine")
    return sample.logp


# -- statistics of the servers, and of the trainer ---------------------------------------------------------------------


def scored_by_trainer(config: Config) -> bool:
    """Whether `Sample.stats` are the trained policy's, at the temperature of the rollouts."""
    return config.reward.statistics == "trainer" and of_the_policy(config)


def of_the_policy(config: Config) -> bool:
    """Whether `Sample.stats` are those of the policy as it sampled, whoever computed them."""
    return config.reward.judge == "policy" and config.reward.temperature in ("rollout", config.rollout.temperature)


def own_logp(config: Config, parts: Parts, samples: Sequence[Sample]) -> list[torch.Tensor] | None:
    """The trainer's log-probs of `samples`, where the scoring pass has left them; the same answer on every rank."""
    if not wants_own(config) or not scored_by_trainer(config) or not parts.reward.needs & STATISTICS:
        return None
    return [sample.stats.get("logp") for sample in samples if sample.stats is not None]


def compare(config: Config, parts: Parts, groups: Sequence[Group]) -> dict[str, float]:
    """Metrics of trainer against engine; every rank takes part. Empty where there is nothing to compare.

    - `mismatch/logp_abs_diff`, `.../logp_max_diff`, `.../kl`, `.../ess`: see `algorithms.corrections.Mismatch`
    - `mismatch/reward_abs_diff`, `.../reward_max_diff`, `.../advantage_abs_diff`: proxy reward and advantage from the
      engine's statistics against those from the trainer's
    - `rollout/stats_abs_diff`, `.../stats_max_diff`: the servers' statistics against the trainer's, over all names
    - `mismatch/alarm`, `rollout/stats_alarm`: 1 while a mean is over its limit
    """
    checked = groups[: config.servers.check_groups]
    wanted = parts.reward.needs & STATISTICS
    all_scored = scored_by_trainer(config) and bool(wanted) and (wants_own(config) or "logp" in wanted)
    if not all_scored and (config.rollout.engine != "sglang" or not config.servers.check_groups):
        return {}
    names = parts.reward.needs & STATISTICS if config.reward.statistics == "servers" else frozenset[str]()
    if all_scored:
        trainer = {id(sample): sample.stats for sample in samples_of(groups) if sample.stats is not None}
    else:
        samples = samples_of(checked)
        rows = [Row(group.prompt.tokens, sample.tokens) for group in checked for sample in group.samples]
        found = parts.policy.score(rows, names | {"logp"})
        trainer = {id(sample): stats for sample, stats in zip(samples, found, strict=True)}
    pairs = [
        log_ratios(trainer[id(sample)].get("logp"), sample.logp)
        for sample in samples_of(groups)
        if id(sample) in trainer and sample.logp is not None
    ]
    sums = [_statistics(checked, trainer, names)] if names else []
    if config.servers.check_groups and _comparable(config, parts):
        sums.append(_rewards(config, parts, checked, trainer))
    return _reduced(config, parts, mismatch(pairs), merge(sums))


def _comparable(config: Config, parts: Parts) -> bool:
    """Whether the reward can be computed from what the engine gave as well as from what the trainer computed."""
    wanted = parts.reward.needs & STATISTICS if config.reward.judge == "policy" else frozenset[str]()
    given = config.reward.statistics == "servers" or wanted == {"logp"}
    return bool(wanted) and given and config.reward.temperature in ("rollout", config.rollout.temperature)


def _statistics(groups: Sequence[Group], trainer: Mapping[int, TokenStats], names: frozenset[str]) -> Sums:
    """Differences of the servers' statistics. The maximum travels as a sum over one case."""
    pieces = [
        (sample.stats.get(name).double() - trainer[id(sample)].get(name).double()).abs()
        for sample in samples_of(groups)
        for name in sorted(names)
        if sample.stats is not None
    ]
    flat = torch.cat([torch.zeros(0, dtype=torch.float64), *pieces])
    return {
        "rollout/stats_abs_diff": (float(flat.sum()), float(len(flat))),
        "rollout/stats_max_diff": (float(flat.max()) if len(flat) else 0.0, 1.0),
    }


def _rewards(config: Config, parts: Parts, groups: Sequence[Group], trainer: Mapping[int, TokenStats]) -> Sums:
    """Differences of rewards and of advantages, group by group."""

    def with_stats(group: Group, stats: Sequence[TokenStats]) -> Group:
        members = [replace(sample, stats=each) for sample, each in zip(group.samples, stats, strict=True)]
        return Group(group.prompt, members, group.classes, group.signals)

    def engine(sample: Sample) -> TokenStats:
        given = sample.stats if config.reward.statistics == "servers" else None
        return given if given is not None else TokenStats(logp=sample.logp)

    theirs = parts.reward.score_groups([with_stats(g, [engine(s) for s in g.samples]) for g in groups])
    ours = parts.reward.score_groups([with_stats(g, [trainer[id(s)] for s in g.samples]) for g in groups])
    difference = torch.cat(
        [torch.zeros(0, dtype=torch.float64), *((a.proxy - b.proxy).abs() for a, b in zip(theirs, ours, strict=True))]
    )
    count = float(len(difference))
    sums = {
        "mismatch/reward_abs_diff": (float(difference.sum()), count),
        "mismatch/reward_max_diff": (float(difference.max()) if count else 0.0, 1.0),
    }
    if config.rollout.n_votes > 1:
        moved = [
            (parts.advantage(a.total[None]) - parts.advantage(b.total[None])).abs()
            for a, b in zip(theirs, ours, strict=True)
        ]
        sums["mismatch/advantage_abs_diff"] = (float(sum(each.double().sum() for each in moved)), count)
    return sums


def _reduced(config: Config, parts: Parts, total: Mismatch, sums: Sums) -> dict[str, float]:
    """Metrics over all replicas, and the alarms."""
    everyone = gather_from_leaders({"mismatch": asdict(total), "sums": sums}, parts.layout)
    total = sum((Mismatch(**each["mismatch"]) for each in everyone), Mismatch())
    metrics = total.metrics() | rates(merge(each["sums"] for each in everyone))
    metrics |= {name: max(each["sums"][name][0] for each in everyone) for name in MAXIMA if name in everyone[0]["sums"]}
    if "mismatch/logp_abs_diff" in metrics:
        metrics |= parts.alarms.watch(
            "mismatch/alarm",
            metrics["mismatch/logp_abs_diff"],
            config.algorithm.correction.alarm,
            "The trainer and the engine disagree about the sampled tokens by so many nats on average"
            " (algorithm.correction.alarm): stale weights, another precision, or weights that did not arrive.",
        )
    if "rollout/stats_abs_diff" in metrics:
        metrics |= parts.alarms.watch(
            "rollout/stats_alarm",
            metrics["rollout/stats_abs_diff"],
            config.servers.stats_alarm,
            "The servers' token statistics, which the reward is made of, are so far from the trainer's on average"
            " (servers.stats_alarm): set reward.statistics=trainer if it matters.",
        )
    return metrics
