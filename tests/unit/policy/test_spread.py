"""Rows go where they are computed, whole, and their statistics come home; replicas are threads here."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replicas import Replicas, Wire

from megatron_urlvr.distributed.layout import Layout
from megatron_urlvr.policy import spread as module
from megatron_urlvr.policy.balance import RowCost
from megatron_urlvr.policy.batch import Row
from megatron_urlvr.policy.spread import COLUMNS, Spread

COST = RowCost(token=100, head=10, pair=1)
STEADY = settings(deadline=None, derandomize=True, database=None)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    wire = Wire()
    monkeypatch.setattr(module, "dist", wire)
    monkeypatch.setattr(module, "gather_json", lambda value, group: group(value))
    return wire


def made(replica: int, k: int, prompt: tuple[int, ...], length: int, columns: Sequence[str]) -> Row:
    """A row of which every part says whose it is."""
    own = 1000 * replica + 10 * k
    row = Row(prompt, [own + i for i in range(length)], advantage=own + 1 / 3)
    for n, name in enumerate(columns):
        setattr(row, name, torch.arange(length) + own + n / 10)
    return row


@st.composite
def some_replicas(draw) -> list[list[Row]]:
    """Rows of each of up to four replicas, some of which share prompts; replicas may have none."""
    columns = draw(st.lists(st.sampled_from(COLUMNS), unique=True))
    found = []
    for replica in range(draw(st.integers(2, 4))):
        sizes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), max_size=8))
        found.append([made(replica, k, (replica, *range(p)), n, columns) for k, (p, n) in enumerate(sizes)])
    return found


def spread(rows: list[list[Row]], layout: Layout, *, share_prefix: bool = True) -> list[Spread]:
    """Every replica's, and statistics that it has got home already: the tokens themselves, twice."""

    def work(rank: int, total: Any, gather: Any) -> tuple[Spread, list[torch.Tensor]]:
        mine = Spread(
            rows[rank], replace(layout, dp=len(rows), dp_rank=rank, peers=gather), COST, share_prefix=share_prefix
        )
        found = [torch.tensor([list(row.response), list(row.response)], dtype=torch.float32) for row in mine.rows]
        return mine, mine.returned(found, 2)

    results = Replicas(len(rows)).run(work)
    for own, (_, home) in zip(rows, results, strict=True):
        assert [values.tolist() for values in home] == [[list(row.response)] * 2 for row in own]
    return [each for each, _ in results]


def contents(row: Row) -> tuple[Any, ...]:
    columns = [getattr(row, name) for name in COLUMNS]
    return row.prompt, list(row.response), row.advantage, [c if c is None else (c.tolist(), c.dtype) for c in columns]


@settings(STEADY, max_examples=60)
@given(rows=some_replicas(), share_prefix=st.booleans())
def test_every_row_is_computed_once_with_all_it_carries_and_statistics_come_home(
    layout: Layout, rows: list[list[Row]], share_prefix: bool
):
    with pytest.MonkeyPatch.context() as patch:
        wire = Wire()
        patch.setattr(module, "dist", wire)
        patch.setattr(module, "gather_json", lambda value, group: group(value))
        found = spread(rows, layout, share_prefix=share_prefix)
        again = spread(rows, layout, share_prefix=share_prefix)
    expected = sorted(contents(row) for own in rows for row in own)
    assert sorted(contents(row) for each in found for row in each.rows) == expected
    assert [[contents(row) for row in each.rows] for each in again] == [
        [contents(row) for row in each.rows] for each in found
    ]
    together = Spread([row for own in rows for row in own], layout, COST, share_prefix=share_prefix)
    assert together.metrics == {}
    for each in found:
        assert each.metrics == found[0].metrics
        assert each.flops == together.flops, "no prompt is two replicas' here"
    if expected:
        assert 1 <= found[0].metrics["balance/after"] <= found[0].metrics["balance/before"]


def test_only_rows_that_move_are_sent_with_their_prompt_once(layout: Layout, wire: Wire):
    prompt = tuple(range(50))
    rows = [[made(0, k, prompt, 40, ["weight"]) for k in range(8)], [made(1, 0, (7,), 3, ["weight"])]]
    heavy, light = spread(rows, layout)
    moved = len(light.rows) - 1
    assert 1 < moved < 8
    assert light.metrics["balance/moved"] == moved / 9
    words = 50 + moved * (2 + 40 + 40)
    assert sorted(wire.sent) == sorted([0, 0, words, 2 * moved * 40])
    assert [row for row in heavy.rows if not any(row is own for own in rows[0])] == []


def test_nothing_is_sent_where_replicas_are_even(layout: Layout, wire: Wire):
    rows = [[made(r, k, (r,), 5, []) for k in range(3)] for r in range(3)]
    found = spread(rows, layout)
    assert wire.sent == []
    assert [each.rows for each in found] == rows
    assert found[0].metrics == {"balance/before": 1.0, "balance/after": 1.0, "balance/moved": 0.0}


def test_a_replica_without_rows_gets_some(layout: Layout, wire: Wire):
    found = spread([[made(0, k, (k,), 5, ["weight"]) for k in range(4)], []], layout)
    assert [len(each.rows) for each in found] == [2, 2]
