"""Even shares of rows: against every possible partition of small cases, and what holds of any."""

from itertools import product
from math import exp
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import hf_model, write_family

from megatron_urlvr.policy.balance import GOOD_ENOUGH, Item, RowCost, excess, level, load
from megatron_urlvr.policy.hf.families import experts_of
from megatron_urlvr.policy.hf.folder import read_config

STEADY = settings(deadline=None, derandomize=True, database=None)


def least_possible(items: list[Item], count: int) -> int:
    """The fullest share's cost in the best of all partitions."""
    best = load(range(len(items)), items)
    for places in product(range(count), repeat=len(items)):
        parts = [[i for i, place in enumerate(places) if place == k] for k in range(count)]
        best = min(best, max(load(part, items) for part in parts))
    return best


def fullest(parts: list[list[int]], items: list[Item]) -> int:
    return max(load(part, items) for part in parts)


@st.composite
def some_shares(draw, prompts: int = 1) -> tuple[list[list[int]], list[Item]]:
    """Items of some prompts, in shares of any size; a prompt costs the same wherever it is."""
    costs = [draw(st.integers(0, 40)) for _ in range(prompts)]
    keys = draw(st.lists(st.integers(0, prompts - 1), max_size=24))
    items = [Item(draw(st.integers(1, 100)), costs[key], key) for key in keys]
    count = draw(st.integers(1, 5))
    parts: list[list[int]] = [[] for _ in range(count)]
    for i in range(len(items)):
        parts[draw(st.integers(0, count - 1))].append(i)
    return parts, items


@STEADY
@given(some_shares(prompts=4))
def test_every_row_is_in_one_share_and_none_is_fuller_than_the_fullest_was(case):
    parts, items = case
    found = level(parts, items)
    assert sorted(i for part in found for i in part) == list(range(len(items)))
    assert len(found) == len(parts)
    assert all(part == sorted(part) for part in found)
    assert fullest(found, items) <= fullest(parts, items)
    assert level(parts, items) == found


@STEADY
@given(some_shares())
def test_without_common_prompts_the_fullest_is_above_the_mean_by_its_smallest_row_at_most(case):
    parts, items = case
    items = [Item(item.own, 0, i) for i, item in enumerate(items)]
    found = level(parts, items)
    total = sum(item.own for item in items)
    part = max(found, key=lambda part: load(part, items))
    above = load(part, items) - total / len(parts)
    assert above <= max(min((items[i].own for i in part), default=0), total / len(parts) * GOOD_ENOUGH)


def drawn(seed: int, rows: int, *, prompts: int, prompt: int) -> list[Item]:
    """Rows of lengths that spread as responses do, `rows / prompts` to a prompt that costs so much."""
    rng = Random(seed)
    return [Item(int(1000 * exp(rng.gauss(0, 0.8))), prompt, i * prompts // rows) for i in range(rows)]


@pytest.mark.parametrize(("prompts", "prompt"), [(9, 0), (3, 100), (3, 2000)], ids=["none", "short", "long"])
def test_small_cases_come_close_to_the_best_of_all_partitions(prompts: int, prompt: int):
    ratios = []
    for seed in range(8):
        items = drawn(seed, 9, prompts=prompts, prompt=prompt)
        parts = [list(range(k, k + 3)) for k in range(0, 9, 3)]
        ratios.append(fullest(level(parts, items), items) / least_possible(items, 3))
    assert min(ratios) >= 1
    assert max(ratios) < 1.15
    assert sum(ratios) / len(ratios) < 1.05


@pytest.mark.parametrize("replicas", [4, 8, 16])
def test_many_rows_are_as_even_as_makes_a_difference_and_most_stay(replicas: int):
    items = drawn(replicas, 32 * replicas, prompts=4 * replicas, prompt=0)
    parts = [list(range(32 * k, 32 * k + 32)) for k in range(replicas)]
    found = level(parts, items)
    assert excess([load(part, items) for part in parts]) > 1.1
    assert excess([load(part, items) for part in found]) <= 1 + GOOD_ENOUGH
    stayed = sum(len(set(now) & set(before)) for now, before in zip(found, parts, strict=True))
    assert stayed > 0.85 * len(items)


def test_rows_stay_with_a_prompt_that_costs_more_than_they_do():
    items = [Item(50 + i, 1000, i // 4) for i in range(16)]
    parts = [list(range(4 * k, 4 * k + 4)) for k in range(4)]
    assert level(parts, items) == parts


def test_one_row_longer_than_all_others_has_a_share_of_its_own():
    items = [Item(1000, 0, 0), *(Item(10, 0, k) for k in range(1, 20))]
    found = level([list(range(10)), list(range(10, 20))], items)
    assert found == [[0], list(range(1, 20))]


@pytest.mark.parametrize("name", ["qwen2", "llama2", "qwen3_moe"])
def test_a_rows_cost_is_what_torch_counts_in_transformers_forward(tmp_path: Path, name: str):
    """transformers attends to all of a row, and computes the logits of all its tokens: so must the cost here."""
    from torch.utils.flop_counter import FlopCounterMode

    folder = write_family(tmp_path / name, name)
    hf, tokens = read_config(folder), 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hf_model(folder)(input_ids=torch.arange(1, tokens + 1)[None])
    cost = RowCost.of(hf)
    expected = tokens * (cost.token + cost.head) + tokens**2 * cost.pair
    if name == "qwen3_moe":  # the router's scores, which are not worth a term
        expected += 2 * tokens * 2 * hf["hidden_size"] * experts_of(hf)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_sharing_a_prompt_splits_the_same_cost():
    cost = RowCost(7, 5, 3)
    whole, shared = (cost.item(11, 6, 0, share_prefix=share) for share in (False, True))
    # 11 + 5 inputs, each attending to those before and itself, and 6 rows of the output table.
    assert whole.own == 7 * 16 + 3 * sum(range(1, 17)) + 5 * 6
    assert shared.own + shared.prompt == whole.own
    assert shared.prompt == 7 * 11 + 3 * sum(range(1, 12))
