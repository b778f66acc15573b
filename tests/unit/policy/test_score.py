"""The scoring pass against transformers' own float64 forward, row by row."""

from pathlib import Path

import pytest
import torch
from tiny_models import hf_model, oracle_stats, random_rows

from megatron_urlvr.policy.batch import Row
from megatron_urlvr.policy.policy import Policy
from megatron_urlvr.types import STATISTICS, TokenStats

VOCAB = 29
TOLERANCE = 1e-5


def assert_like_transformers(found: list[TokenStats], rows: list[Row], folder: Path, **kwargs):
    model = hf_model(folder)
    assert len(found) == len(rows)
    for i, (row, stats) in enumerate(zip(rows, found, strict=True)):
        assert stats.present() == STATISTICS
        for name, expected in oracle_stats(model, row, **kwargs).items():
            got = stats.get(name)
            assert got.dtype == torch.float32
            assert got.shape == (len(row.response),)
            assert torch.allclose(got.double(), expected, rtol=0, atol=TOLERANCE), (
                f"row {i}, {name}: off by {float((got - expected).abs().max()):.2e}"
            )


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared prefixes", "whole sequences"])
@pytest.mark.parametrize("name", ["untied", "tied", "full", "single"])
def test_every_statistic_is_transformers_own(make_policy, folders, name: str, share_prefix: bool):
    rows = random_rows(24, vocab=VOCAB)
    policy = make_policy(name, parallel={"share_prefix": share_prefix})
    assert_like_transformers(policy.score(rows, STATISTICS), rows, folders[name])


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared prefixes", "whole sequences"])
@pytest.mark.parametrize("budget", [1, 13, 40, 100])
def test_no_microbatch_budget_changes_a_statistic(make_policy, folders, budget: int, share_prefix: bool):
    rows = random_rows(20, vocab=VOCAB, seed=budget)
    policy = make_policy(parallel={"share_prefix": share_prefix, "max_tokens_per_microbatch": budget})
    assert_like_transformers(policy.score(rows, STATISTICS), rows, folders["untied"])


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared prefixes", "whole sequences"])
def test_statistics_follow_the_rows_order_with_prompts_interleaved(make_policy, folders, share_prefix: bool):
    rows = random_rows(20, vocab=VOCAB, seed=3)
    policy = make_policy(parallel={"share_prefix": share_prefix, "max_tokens_per_microbatch": 50})
    for seed in range(3):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = [rows[i] for i in order]
        assert_like_transformers(policy.score(shuffled, STATISTICS), shuffled, folders["untied"])


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared prefixes", "whole sequences"])
def test_long_responses_beside_short_ones(make_policy, folders, share_prefix: bool):
    rows = random_rows(10, vocab=VOCAB, seed=6, longest=110)
    assert min(len(row.response) for row in rows) < 20
    assert max(len(row.response) for row in rows) > 90
    policy = make_policy(parallel={"share_prefix": share_prefix})
    assert_like_transformers(policy.score(rows, STATISTICS), rows, folders["untied"])


def test_equal_rows_get_equal_statistics(make_policy, folders):
    row = Row((3, 1, 4), [1, 5, 9, 2])
    rows = [row, Row((3, 1), [4, 1, 5, 9, 2]), row, Row((3, 1, 4), [1, 5, 9])]
    policy = make_policy()
    assert_like_transformers(policy.score(rows, STATISTICS), rows, folders["untied"])


def test_a_batch_of_single_tokens_and_one_token_prompts(make_policy, folders):
    rows = [Row((7,), [i]) for i in range(VOCAB)]
    for share_prefix in (True, False):
        policy = make_policy(parallel={"share_prefix": share_prefix})
        assert_like_transformers(policy.score(rows, STATISTICS), rows, folders["untied"])


def test_temperature_divides_the_logits_and_the_mask_cuts_the_vocabulary(make_policy, folders):
    rows = random_rows(12, vocab=21, seed=5)
    policy: Policy = make_policy("tied", temperature=0.7, real_vocab=21)
    assert_like_transformers(policy.score(rows, STATISTICS), rows, folders["tied"], temperature=0.7, vocab=21)
    hot = policy.score(rows, STATISTICS, temperature=1.9)
    assert_like_transformers(hot, rows, folders["tied"], temperature=1.9, vocab=21)


def test_only_what_is_wanted_is_computed(make_policy):
    (stats,) = make_policy().score([Row((1, 2), [3])], frozenset({"top2_gap", "logp"}))
    assert stats.present() == {"top2_gap", "logp"}


def test_no_rows_give_no_statistics(make_policy):
    assert make_policy().score([], STATISTICS) == []


def test_a_row_without_prompt_or_response_is_refused(make_policy):
    with pytest.raises(ValueError, match="row 1 has 0 prompt tokens and 1 response token"):
        make_policy().score([Row((1,), [2]), Row((), [2])], STATISTICS)
    with pytest.raises(ValueError, match="row 0 has 1 prompt token and 0 response tokens"):
        make_policy().score([Row((1,), [])], STATISTICS)


def test_weights_that_are_not_kept_are_not_made_up(make_policy):
    with pytest.raises(ValueError, match="keeps no reference weights"):
        make_policy().score([Row((1,), [2])], STATISTICS, "reference")
