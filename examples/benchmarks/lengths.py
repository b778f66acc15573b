"""How uneven responses of many lengths make a step: over data-parallel replicas, and over a pipeline's micro-batches.

    python examples/benchmarks/lengths.py [MODEL]      # a folder with a config.json

Nothing is run: lengths are drawn, and shared and planned by what the policy shares and plans with. Their logarithms are
normal around a level that each prompt has of its own, levels spread half as far as the samples around them. Means over
ten draws; seconds are those of deciding what moves.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Sequence
from itertools import product

from megatron_urlvr.policy.balance import RowCost, excess, level, load
from megatron_urlvr.policy.batch import Row, fewer_microbatches, level_microbatches, plan_microbatches
from megatron_urlvr.policy.hf.folder import read_config

MODEL = "configs/recipes/models/Qwen2.5-72B"
SAMPLES, LONGEST, BUDGET, DRAWS = 8, 7168, 8192, 10
HEADER = (
    "prompts replicas median sigma | cost, most over mean: as shared  evened out  rows moved  seconds"
    " | pipeline rows of use: as planned  levelled"
)


def draw(rng: random.Random, prompts: int, *, median: float, sigma: float) -> list[list[Row]]:
    """The rows of every prompt."""
    groups = []
    for name in range(prompts):
        prompt = (name,) * rng.randint(60, 250)
        centre = rng.gauss(0, sigma / 2)
        lengths = [int(median * math.exp(centre + rng.gauss(0, sigma))) for _ in range(SAMPLES)]
        groups.append([Row(prompt, range(min(LONGEST, max(16, length)))) for length in lengths])
    return groups


def shared(groups: Sequence[Sequence[Row]], replicas: int) -> list[list[int]]:
    """Numbers of the rows that each replica gets with its prompts."""
    parts: list[list[int]] = [[] for _ in range(replicas)]
    for k in range(len(groups)):
        parts[k % replicas] += range(k * SAMPLES, (k + 1) * SAMPLES)
    return parts


def used(rows: Sequence[Row], plans: Sequence[Sequence[Sequence[int]]]) -> float:
    """Share of a pipeline's rows that is no padding: each replica pads to its longest micro-batch, and all run as many
    micro-batches as the one that has most."""
    tokens = [[sum(rows[i].tokens - 1 for i in part) for part in plan] for plan in plans]
    count = max(map(len, plans))
    return sum(map(sum, tokens)) / sum(count * max(each) for each in tokens)


def planned(rows: Sequence[Row], parts: Sequence[Sequence[int]], *, levelled: bool) -> float:
    """`used`, of micro-batches filled one after the other, or made even."""
    mine = [[rows[i] for i in part] for part in parts]
    plans = [plan_microbatches(each, max_tokens=BUDGET, share_prefix=False) for each in mine]
    if levelled:
        plans = [fewer_microbatches(each, plan, share_prefix=False) for each, plan in zip(mine, plans, strict=True)]
        count = max(map(len, plans))
        plans = [[*plan, *([] for _ in range(count - len(plan)))] for plan in plans]
        plans = [level_microbatches(each, plan, share_prefix=False) for each, plan in zip(mine, plans, strict=True)]
    order = [i for part in parts for i in part]
    shift = [sum(map(len, parts[:k])) for k in range(len(parts))]
    return used(
        [rows[i] for i in order],
        [[[i + first for i in part] for part in plan] for first, plan in zip(shift, plans, strict=True)],
    )


def one(groups: Sequence[Sequence[Row]], replicas: int, cost: RowCost) -> tuple[float, ...]:
    """What `HEADER` names, of one draw."""
    rows = [row for group in groups for row in group]
    keys = [k for k, group in enumerate(groups) for _ in group]
    items = [
        cost.item(len(row.prompt), len(row.response), key, share_prefix=False)
        for row, key in zip(rows, keys, strict=True)
    ]
    before = shared(groups, replicas)
    started = time.perf_counter()
    after = level(before, items)
    seconds = time.perf_counter() - started
    moved = sum(len(set(a) - set(b)) for a, b in zip(after, before, strict=True)) / len(rows)
    loads = [[load(part, items) for part in parts] for parts in (before, after)]
    padding = (planned(rows, before, levelled=False), planned(rows, after, levelled=True))
    return (*map(excess, loads), moved, seconds, *padding)


def main() -> None:
    cost = RowCost.of(read_config(sys.argv[1] if len(sys.argv) > 1 else MODEL))
    print(HEADER)
    for (prompts, replicas), (median, sigma) in product(
        ((64, 4), (64, 8), (64, 16), (64, 32)), ((1200, 0.6), (2500, 0.5))
    ):
        draws = [
            one(draw(random.Random(seed), prompts, median=median, sigma=sigma), replicas, cost) for seed in range(DRAWS)
        ]
        a, b, moved, seconds, plain, even = (sum(values) / DRAWS for values in zip(*draws, strict=True))
        print(
            f"{prompts:7} {replicas:8} {median:6} {sigma:5} | {a:32.3f} {b:11.3f} {moved:11.2f} {seconds:8.3f}"
            f" | {plain:32.3f} {even:9.3f}"
        )


if __name__ == "__main__":
    main()
