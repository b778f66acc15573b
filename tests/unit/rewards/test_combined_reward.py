"""Terms, weights, normalisation, and the check before step 0."""

import asyncio

import pytest
import torch

from megatron_urlvr.config.reward import RewardSection
from megatron_urlvr.rewards import (
    UNIT,
    Combined,
    MissingSignalError,
    Provider,
    Reward,
    Term,
    build_terms,
    missing_signals,
)


def combined(terms, advantage="grpo", **kwargs):
    return build_terms(RewardSection(terms=terms), advantage=advantage, seed=0, **kwargs)


def test_the_total_is_the_weighted_sum_of_the_terms(make_group):
    group = make_group(classes=[0, 0, 2, None], logp=[[-1.0], [-2.0], [-3.0], [-4.0]])
    result = combined(
        {
            "vote": {"name": "majority_vote", "weight": 2.0},
            "sure": {"name": "trajectory_entropy", "aggregation": "sum", "weight": 0.5},
        }
    ).score(group)
    assert result.by_term["vote"].tolist() == [1, 1, 0, 0]
    assert result.by_term["sure"].tolist() == [-1, -2, -3, -4]
    assert result.total.tolist() == [1.5, 1.0, -1.5, -2.0]


def test_a_normalised_term_has_zero_mean_and_unit_deviation_within_its_group(make_group):
    group = make_group(classes=[0, 0, 2, None], logp=[[-1.0], [-2.0], [-4.0], [-9.0]])
    terms = {
        "sure": {"name": "trajectory_entropy", "aggregation": "sum", "weight": 3.0, "normalize": True},
        "vote": {"name": "majority_vote"},
    }
    result = combined(terms).score(group)
    values = [-1.0, -2.0, -4.0, -9.0]
    mean = sum(values) / 4
    deviation = (sum((v - mean) ** 2 for v in values) / 3) ** 0.5
    expected = [3 * (v - mean) / deviation + r for v, r in zip(values, [1, 1, 0, 0], strict=True)]
    assert result.total.tolist() == pytest.approx(expected, rel=1e-5)
    assert result.by_term["sure"].tolist() == values


def test_groups_of_different_sizes_are_normalised_each_by_itself(make_group):
    terms = {"sure": {"name": "trajectory_entropy", "aggregation": "sum", "normalize": True}}
    groups = [make_group("a", logp=[[-1.0], [-3.0]]), make_group("b", logp=[[-5.0], [-6.0], [-7.0]])]
    together = combined(terms).score_groups(groups)
    for group, result in zip(groups, together, strict=True):
        assert torch.equal(result.total, combined(terms).score(group).total)
        assert float(result.total.mean()) == pytest.approx(0, abs=1e-9)


def test_groups_without_variance_are_counted_and_normalise_to_zero(make_group):
    terms = {"vote": {"name": "majority_vote", "normalize": True}}
    same, mixed = make_group("a", classes=[0, 0]), make_group("b", classes=[0, 1])
    one, two = combined(terms).score_groups([same, mixed])
    assert one.total.tolist() == [0, 0]
    assert (one.counts["vote/zero_variance"], two.counts["vote/zero_variance"]) == (1.0, 0.0)


def test_no_groups_give_no_results():
    assert combined({"vote": {"name": "majority_vote"}}).score_groups([]) == []


def test_needs_and_supervision_are_those_of_all_terms():
    both = combined(
        {"a": {"name": "token_entropy", "aggregation": "sum"}, "b": {"name": "ground_truth", "weight": 0.1}}
    )
    assert both.needs == {"entropy", "label"}
    assert both.supervised
    assert not combined({"a": {"name": "majority_vote"}}).supervised


def test_signals_that_nobody_provides_are_listed_before_the_first_step():
    both = combined({"a": {"name": "token_entropy", "aggregation": "sum"}, "b": {"name": "majority_vote"}})
    assert missing_signals(both, frozenset({"entropy", "answer", "logp"})) == []
    first, second = missing_signals(both, frozenset({"logp"}))
    assert "token_entropy" in first
    assert "'entropy'" in first
    assert "reward.terms.a" in first
    assert "logp" in first
    assert "majority_vote" in second
    assert "'answer'" in second


class Judged(Reward):
    name = "judged"
    needs = frozenset({"judge"})
    formula = "judge"
    value_range = UNIT
    source = "a test"

    def score(self, group):
        from megatron_urlvr.rewards.base import signal_of

        return signal_of(self, group, "judge")


class Judge(Provider):
    provides = frozenset({"judge"})

    async def fetch(self, groups):
        for group in groups:
            group.signals["judge"] = torch.tensor([0.25, 1.0])


def test_a_third_partys_reward_reads_what_its_provider_filled_in(make_group):
    mine = Combined([Term("mine", Judged(), weight=2.0, normalize=False)])
    group = make_group("q", lengths=[1, 1])
    assert len(missing_signals(mine, frozenset({"logp"}))) == 1
    assert missing_signals(mine, frozenset({"logp"}) | Judge.provides) == []
    with pytest.raises(MissingSignalError, match=r"judged.*'judge'.*'q'"):
        mine.score(group)
    asyncio.run(Judge().fetch([group]))
    assert mine.score(group).total.tolist() == [0.5, 2.0]


def test_a_reward_that_returns_another_shape_is_named(make_group):
    class Wrong(Judged):
        def score(self, group):
            return torch.zeros(len(group), 1)

    with pytest.raises(TypeError, match=r"judged.*\(2, 1\).*2 samples"):
        Combined([Term("mine", Wrong(), 1.0, False)]).score(make_group("q", lengths=[1, 1]))
