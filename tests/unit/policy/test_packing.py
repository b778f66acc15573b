"""Micro-batches and their packing: what each token may look at is spelled out, whatever the rows."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_urlvr.config.parallel import ParallelSection
from megatron_urlvr.policy import model
from megatron_urlvr.policy import packing as module
from megatron_urlvr.policy.batch import Row, fewer_microbatches, level_microbatches, plan_microbatches
from megatron_urlvr.policy.packing import PackedBatch, Share, pack, packed_length
from megatron_urlvr.policy.policy import _share_prefix

STEADY = settings(deadline=None, derandomize=True, database=None)
TOKEN = st.integers(1, 9)
PROMPTS = st.lists(st.lists(TOKEN, min_size=1, max_size=6).map(tuple), min_size=1, max_size=4)


@pytest.fixture(scope="module", autouse=True, params=[module.SHORT, 1], ids=["one table", "tables by length"])
def short(request: pytest.FixtureRequest) -> Iterator[None]:
    """Segments of these few tokens are attended to together, and apart by length as long ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHORT", request.param)
        yield


@st.composite
def some_rows(draw, least: int = 0) -> list[Row]:
    """Rows of at most four prompts, one of which may begin another."""
    prompts = draw(PROMPTS)
    responses = st.lists(TOKEN, min_size=1, max_size=7)
    chosen = draw(st.lists(st.tuples(st.sampled_from(prompts), responses), min_size=least, max_size=12))
    return [Row(prompt, response) for prompt, response in chosen]


def tokens_needed(rows: list[Row], *, share_prefix: bool) -> int:
    """Input tokens of these rows in one micro-batch; the last token of a response is no input."""
    prompts = {row.prompt for row in rows} if share_prefix else [row.prompt for row in rows]
    return sum(map(len, prompts)) + sum(len(row.response) - 1 for row in rows)


@settings(STEADY, max_examples=100)
@given(some_rows(), st.integers(1, 40), st.booleans())
def test_every_row_is_planned_once_and_within_the_budget(rows: list[Row], budget: int, share_prefix: bool):
    plan = plan_microbatches(rows, max_tokens=budget, share_prefix=share_prefix)
    assert sorted(i for part in plan for i in part) == list(range(len(rows)))
    for part in plan:
        assert part
        need = tokens_needed([rows[i] for i in part], share_prefix=share_prefix)
        assert need <= budget or len(part) == 1


@settings(STEADY, max_examples=100)
@given(some_rows(least=1), st.booleans())
def test_a_budget_for_all_rows_makes_one_microbatch(rows: list[Row], share_prefix: bool):
    budget = tokens_needed(rows, share_prefix=share_prefix)
    assert len(plan_microbatches(rows, max_tokens=budget, share_prefix=share_prefix)) == 1


@settings(STEADY, max_examples=100)
@given(some_rows(), st.integers(1, 40), st.integers(0, 3), st.booleans())
def test_levelled_micro_batches_hold_the_same_rows_and_none_is_longer(
    rows: list[Row], budget: int, empty: int, share_prefix: bool
):
    plan = plan_microbatches(rows, max_tokens=budget, share_prefix=share_prefix) + [[] for _ in range(empty)]
    found = level_microbatches(rows, plan, share_prefix=share_prefix)
    assert sorted(i for part in found for i in part) == list(range(len(rows)))
    assert len(found) == len(plan)

    def longest(parts: list[list[int]]) -> int:
        return max((tokens_needed([rows[i] for i in part], share_prefix=share_prefix) for part in parts), default=0)

    assert longest(found) <= longest(plan)
    fewer = fewer_microbatches(rows, plan, share_prefix=share_prefix)
    assert sorted(i for part in fewer for i in part) == list(range(len(rows)))
    assert longest(fewer) <= longest(found)
    assert len(fewer) <= max(len(plan), 1)


def test_rows_fill_up_to_one_that_is_longer_than_the_budget():
    rows = [Row((1,), range(100)), *(Row((2 + i,), range(30)) for i in range(6))]
    plan = plan_microbatches(rows, max_tokens=60, share_prefix=False)
    assert len(plan) == 4
    assert sorted(map(len, fewer_microbatches(rows, plan, share_prefix=False))) == [1, 3, 3]


def test_levelling_leaves_a_pipeline_little_padding():
    """Responses of many lengths, each with a prompt of its own, in micro-batches of up to a thousand tokens."""
    rows = [Row((i,), range(30 + (i * 37) % 500)) for i in range(64)]
    plan = plan_microbatches(rows, max_tokens=1000, share_prefix=False)

    def used(parts: list[list[int]]) -> float:
        tokens = [tokens_needed([rows[i] for i in part], share_prefix=False) for part in parts]
        return sum(tokens) / (len(tokens) * max(tokens))

    assert used(plan) < 0.9
    assert used(level_microbatches(rows, plan, share_prefix=False)) > 0.97


def attended(batch: PackedBatch, row: int) -> list[tuple[int, int]]:
    """(share, row) of all that the attention of a share's `row` looks at, in the order of the keys."""
    place, rows = int(batch.restore[row]), batch.tokens.shape[1]
    for table in batch.segments:
        count, longest = table.queries.shape
        if place < count * longest:
            n, q = divmod(place, longest)
            assert int(table.queries[n, q]) == row
            keys = table.gather[n]
            seen = keys[: q + 1] if table.mask is None else keys[table.mask.expand(count, -1, -1, -1)[n, 0, q]]
            return [divmod(int(key), rows) for key in seen]
        place -= count * longest
    raise AssertionError(f"row {row} has no attention output")


@settings(STEADY, max_examples=70)
@given(some_rows(), st.randoms(use_true_random=False), st.booleans(), st.sampled_from([1, 2, 4]), st.integers(0, 80))
def test_every_prediction_sees_its_own_prompt_and_response_so_far_and_nothing_else(
    rows: list[Row], random, share_prefix: bool, pad_to: int, length: int
):
    index = list(range(len(rows)))
    random.shuffle(index)
    length -= length % pad_to
    batch = pack(rows, index, share_prefix=share_prefix, pad_to=pad_to, length=length)
    assert batch.targets.tolist() == [token for i in index for token in rows[i].response]
    assert batch.lengths == [len(rows[i].response) for i in index]
    out = iter(batch.out_rows.tolist())
    tokens, positions = batch.tokens[0], batch.positions
    for i in index:
        row = rows[i]
        for t in range(len(row.response)):
            seen = [r for _, r in attended(batch, next(out))]
            assert [int(tokens[r]) for r in seen] == [*row.prompt, *row.response[:t]]
            assert [int(positions[r]) for r in seen] == list(range(len(row.prompt) + t))


@settings(STEADY, max_examples=70)
@given(some_rows(), st.booleans(), st.sampled_from([2, 3]), st.sampled_from([1, 2]), st.integers(0, 80))
def test_shares_of_context_parallel_ranks_see_the_same_and_are_equally_large(
    rows: list[Row], share_prefix: bool, size: int, pad_to: int, length: int
):
    packing = {"share_prefix": share_prefix, "pad_to": pad_to}
    shares = [pack(rows, range(len(rows)), length=length, share=Share(size, k), **packing) for k in range(size)]
    least = packed_length(rows, range(len(rows)), share=Share(size, 0), **packing)
    wanted = [(row, t) for row in rows for t in range(len(row.response))]
    made: list[int] = []
    for batch in shares:
        assert batch.tokens.shape[1] == batch.length // size
        assert batch.tokens.shape[1] % pad_to == 0
        assert least <= batch.length < max(least, length) + 2 * size * pad_to
        assert batch.own is not None
        made += batch.own.tolist()
        for k, out, target in zip(batch.own.tolist(), batch.out_rows.tolist(), batch.targets.tolist(), strict=True):
            row, t = wanted[k]
            assert target == row.response[t]
            seen = attended(batch, out)
            assert [int(shares[s].tokens[0, r]) for s, r in seen] == [*row.prompt, *row.response[:t]]
            assert [int(shares[s].positions[r]) for s, r in seen] == list(range(len(row.prompt) + t))
        filled = torch.cat([table.rows for table in batch.segments])
        assert sorted(filled.tolist()) == list(range(batch.tokens.shape[1]))
    assert sorted(made) == list(range(len(wanted)))


def test_transformer_engines_attention_is_spared_the_tables_of_ours():
    """Four ranks' masks of a sequence of 64k tokens would be of a gigabyte each."""
    rows = [Row((1,) * 100, [2] * 65_000), Row((1,) * 100, [2] * 300)]
    share = Share(4, 1)
    batch = pack(rows, [0, 1], share_prefix=False, share=share, tables=False)
    assert sum(x.nbytes for x in vars(batch).values() if isinstance(x, torch.Tensor)) < 64 * batch.length
    assert (batch.segments, batch.restore.numel()) == ([], 0)
    short = [Row((1,) * 100, [2] * 650), rows[1]]
    with_tables, without = (pack(short, [0, 1], share_prefix=False, share=share, tables=t) for t in (True, False))
    for name, value in vars(with_tables).items():
        if name not in ("segments", "restore"):
            same = torch.equal(value, getattr(without, name)) if isinstance(value, torch.Tensor) else None
            assert value == getattr(without, name) if same is None else same, name


@pytest.mark.parametrize("installed", [False, True])
def test_float32_is_attended_to_by_our_attention_as_transformer_engine_packs_half_precision_alone(
    monkeypatch, installed: bool
):
    """Its get_attention_backend finds no kernel for float32 and `thd` (2.8 and 2.9; later ones, none under cp)."""
    monkeypatch.setattr(model, "has_transformer_engine", lambda: installed)
    for dtype, theirs in ((torch.float32, False), (torch.bfloat16, installed)):
        assert model.own_attention(False, dtype) is not theirs
        assert _share_prefix(ParallelSection(), dtype) is not theirs
        assert _share_prefix(ParallelSection(share_prefix=False), dtype) is False
        assert model.own_attention(True, dtype)


def test_causal_attention_costs_all_shares_alike():
    lengths = torch.tensor([24, 48])
    for size in (2, 3):
        costs = {
            int((offsets + 1)[there].sum()) for offsets, there in (Share(size, k).offsets(lengths) for k in range(size))
        }
        assert len(costs) == 1


@settings(STEADY, max_examples=70)
@given(some_rows(), st.booleans(), st.sampled_from([1, 2, 4]), st.integers(0, 80))
def test_each_packed_row_has_one_attention_output_and_padding_is_looked_at_by_padding_alone(
    rows: list[Row], share_prefix: bool, pad_to: int, length: int
):
    length -= length % pad_to
    batch = pack(rows, range(len(rows)), share_prefix=share_prefix, pad_to=pad_to, length=length)
    total = batch.length
    assert total >= packed_length(rows, range(len(rows)), share_prefix=share_prefix, pad_to=pad_to)
    used = tokens_needed(rows, share_prefix=share_prefix)
    assert total % pad_to == 0
    assert total >= max(length, used + 1)
    assert total < max(length, used + 1) + pad_to
    # A permutation: no two rows share an output, and every output that is not padding is taken.
    outputs = sum(table.queries.numel() for table in batch.segments)
    assert max(Counter(batch.restore.tolist()).values()) == 1
    assert 0 <= int(batch.restore.min()) <= int(batch.restore.max()) < outputs
    filled = torch.cat([table.rows for table in batch.segments])
    assert sorted(filled.tolist()) == list(range(total))
    for packed_row in range(total):
        seen = [row for _, row in attended(batch, packed_row)]
        assert len(seen) == len(set(seen))
        assert packed_row in seen
        assert max(seen) < used if packed_row < used else min(seen) >= used


@settings(STEADY, max_examples=30)
@given(some_rows(least=1))
def test_whole_sequences_end_where_transformer_engine_is_told(rows: list[Row]):
    batch = pack(rows, range(len(rows)), share_prefix=False, pad_to=4)
    assert batch.cu_seqlens is not None
    ends = batch.cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(ends)]
    assert lengths[: len(rows)] == [len(row.prompt) + len(row.response) - 1 for row in rows]
    assert ends[-1] == batch.tokens.shape[1]
    assert batch.max_seqlen == max(lengths)


@settings(STEADY, max_examples=30)
@given(some_rows(least=1))
def test_a_shared_prompt_is_an_input_once(rows: list[Row]):
    batch = pack(rows, range(len(rows)), share_prefix=True)
    assert batch.cu_seqlens is None
    assert batch.tokens.shape[1] == tokens_needed(rows, share_prefix=True) + 1
