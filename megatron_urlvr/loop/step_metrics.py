"""What is told of a step's rollouts: metrics without labels, and the audit against them, over all replicas."""

from __future__ import annotations

from collections.abc import Sequence

from ..config.root import Config
from ..distributed.exchange import merge_sums
from ..monitor.audit import audit_sums, merge, rates, rollout_sums, term_sums
from ..rewards.combine import RewardResult
from ..types import Group
from .assembly import Parts
from .batching import divergence_from_start
from .feed import Feed
from .off_policy import compare, of_the_policy


def step_metrics(
    config: Config,
    parts: Parts,
    feed: Feed,
    groups: Sequence[Group],
    results: Sequence[RewardResult],
    *,
    version: int,
    divergence: bool,
) -> dict[str, float]:
    """Metrics of this replica's `groups` and of all others'. `version`: of the policy's weights; `divergence`: how far
    they are from the start, too, which takes a forward pass. Collective."""
    proxies, totals = [result.proxy for result in results], [result.total for result in results]
    correct = [parts.correctness(group, use="audit") for group in groups]
    tokens = float(sum(sample.length for group in groups for sample in group.samples))
    sums = [rollout_sums(groups, proxies, totals), term_sums(groups, results)]
    if not of_the_policy(config):
        sums[0].pop("policy/entropy", None)  # of another temperature, or other weights
    sums.append(audit_sums(groups, totals, correct))  # of the proxy its order counts, which small numbers lose
    if divergence:
        sums.append(divergence_from_start(parts, groups))
    sums.append({"tokens/step": (tokens, 1.0 / parts.layout.dp)})
    sums.append(feed.age_sums(groups, version))
    found = rates(merge_sums(merge(sums), parts.layout))
    return found | feed.oldest_age(groups, version) | compare(config, parts, groups)
