"""How a step's prompts are shared among replicas."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_urlvr.distributed.exchange import in_order, my_share
from megatron_urlvr.distributed.layout import Layout


def shares(items: list[int], layout: Layout, dp: int) -> list[list[int]]:
    return [my_share(items, replace(layout, dp=dp, dp_rank=rank)) for rank in range(dp)]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(), max_size=20), st.integers(1, 5))
def test_shares_differ_by_one_at_most_and_join_again_in_order(layout: Layout, items: list[int], dp: int):
    found = shares(items, layout, dp)
    sizes = [len(share) for share in found]
    assert max(sizes) - min(sizes) <= 1
    assert in_order(found) == items


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_replicas_begin_together_with_the_first_prompts_so_that_mini_batches_are_the_same(layout: Layout, dp: int):
    items, mini_batch = list(range(16)), 4
    for start in range(0, 16, mini_batch):
        own = slice(start // dp, (start + mini_batch) // dp)
        together = [item for share in shares(items, layout, dp) for item in share[own]]
        assert sorted(together) == items[start : start + mini_batch]
