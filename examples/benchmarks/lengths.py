"""How uneven responses of many lengths make a step: over data-parallel replicas, and over a pipeline's micro-batches.

    python examples/benchmarks/lengths.py

Nothing is run: lengths are drawn and planned as the policy plans them. Their logarithms are normal around a level that
each prompt has of its own, levels spread half as far as the samples around them. Means over ten draws.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import product

from megatron_urlvr.policy.batch import Row, plan_microbatches

SAMPLES, LONGEST, BUDGET, DRAWS = 8, 7168, 8192, 10


def draw(rng: random.Random, prompts: int, *, median: float, sigma: float) -> list[list[Row]]:
    """The rows of every prompt."""
    groups = []
    for name in range(prompts):
        prompt = (name,) * rng.randint(60, 250)
        level = rng.gauss(0, sigma / 2)
        lengths = [int(median * math.exp(level + rng.gauss(0, sigma))) for _ in range(SAMPLES)]
        groups.append([Row(prompt, range(min(LONGEST, max(16, length)))) for length in lengths])
    return groups


def planned(rows: Sequence[Row]) -> list[int]:
    """Tokens of each micro-batch that a replica makes of its rows."""
    plan = plan_microbatches(rows, max_tokens=BUDGET, share_prefix=False)
    return [sum(rows[i].tokens - 1 for i in part) for part in plan]


def longest_first(rows: Sequence[Row], replicas: int) -> list[int]:
    """Tokens of each replica if each sample, longest first, went to the one that has least."""
    totals = [0] * replicas
    for row in sorted(rows, key=lambda row: -row.tokens):
        totals[totals.index(min(totals))] += row.tokens
    return totals


def excess(totals: Sequence[int]) -> float:
    """The most over the mean."""
    return max(totals) / (sum(totals) / len(totals))


def main() -> None:
    print("prompts  replicas  median  sigma | tokens, most over mean: as shared  samples moved | pipeline rows of use")
    for (prompts, replicas), (median, sigma) in product(
        ((64, 4), (64, 8), (64, 16), (64, 32)), ((1200, 0.6), (2500, 0.5))
    ):
        shared, moved, used = [], [], []
        for seed in range(DRAWS):
            groups = draw(random.Random(seed), prompts, median=median, sigma=sigma)
            shares = [[row for group in groups[r::replicas] for row in group] for r in range(replicas)]
            plans = [planned(rows) for rows in shares]
            shared.append(excess([sum(plan) for plan in plans]))
            moved.append(excess(longest_first([row for group in groups for row in group], replicas)))
            used.append(sum(sum(plan) / (len(plan) * max(plan)) for plan in plans) / replicas)
        means = [sum(values) / DRAWS for values in (shared, moved, used)]
        print(f"{prompts:7} {replicas:9} {median:7} {sigma:6} | {means[0]:34.3f} {means[1]:14.3f} | {means[2]:20.3f}")


if __name__ == "__main__":
    main()
