"""Certainty rewards against distributions in float64, and the ways in which published ones went wrong."""

import math
from decimal import Decimal, getcontext

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from megatron_urlvr.algorithms.advantages import get_advantage, grpo
from megatron_urlvr.config.reward import RewardSection
from megatron_urlvr.monitor.audit import rates, rollout_sums, term_sums
from megatron_urlvr.rewards import MissingSignalError, NonFiniteScoreError, build_terms, get_reward
from megatron_urlvr.types import TokenStats

CERTAINTY = ["self_certainty", "token_entropy", "trajectory_entropy"]
STATISTIC = {"self_certainty": "self_certainty", "token_entropy": "entropy", "trajectory_entropy": "logp"}


def reward(name, aggregation):
    cls = get_reward(name)
    return cls(cls.Options(aggregation=aggregation))


@pytest.fixture
def random_group(make_group):
    """Six responses over a vocabulary of 23, with logits; statistics in float32, as the scoring pass gives them."""
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(t, 23, generator=generator, dtype=torch.float64) * 3 for t in (1, 2, 5, 9, 16, 40)]
    tokens = [torch.randint(0, 23, (len(z),), generator=generator) for z in logits]
    group = make_group(lengths=[len(z) for z in logits])
    for sample, z, y in zip(group.samples, logits, tokens, strict=True):
        lse = z.logsumexp(-1)
        p = z.softmax(-1)
        sample.stats = TokenStats(
            logp=(z.gather(1, y[:, None])[:, 0] - lse).float(),
            entropy=-(p * p.log()).sum(-1).float(),
            self_certainty=(lse - z.mean(-1) - math.log(23)).float(),
            lse=lse.float(),
        )
    return group, logits, tokens


def per_token_oracle(name, z, y):
    """The table of the URLVR study, by torch's own distributions."""
    policy = Categorical(logits=z)
    if name == "self_certainty":
        return kl_divergence(Categorical(logits=torch.zeros_like(z)), policy)
    return -policy.entropy() if name == "token_entropy" else policy.log_prob(y)


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize("name", CERTAINTY)
def test_scores_are_those_of_the_distributions(name, aggregation, random_group):
    group, logits, tokens = random_group
    expected = [getattr(per_token_oracle(name, z, y), aggregation)() for z, y in zip(logits, tokens, strict=True)]
    torch.testing.assert_close(reward(name, aggregation).score(group), torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_the_other_self_certainty_in_circulation_differs_by_log_v_and_trains_alike(random_group):
    group, logits, _ = random_group
    ours = reward("self_certainty", "mean").score(group)
    circulating = torch.stack([(z.logsumexp(-1) - z.mean(-1)).mean() for z in logits])
    torch.testing.assert_close(circulating - ours, torch.full((6,), math.log(23), dtype=torch.float64))
    torch.testing.assert_close(grpo(circulating[None]), grpo(ours[None]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CERTAINTY)
def test_aggregation_has_no_default(name):
    with pytest.raises(ValueError, match="aggregation"):
        get_reward(name)()
    with pytest.raises(ValueError, match="aggregation"):
        RewardSection(terms={"main": {"name": name}})


def test_sums_are_ordered_like_probabilities_and_means_are_not(make_group):
    # pi = e^-1 in one token, pi = e^-2 in ten
    group = make_group(logp=[[-1.0], [-0.2] * 10])
    short, long = reward("trajectory_entropy", "sum").score(group).tolist()
    assert short == pytest.approx(-1)
    assert long == pytest.approx(-2)
    short, long = reward("trajectory_entropy", "mean").score(group).tolist()
    assert short == pytest.approx(-1)
    assert long == pytest.approx(-0.2)


def test_padding_with_certain_tokens_raises_the_mean_entropy_reward_and_not_the_sum(make_group):
    group = make_group(entropy=[[1.0, 1.0], [1.0, 1.0] + [0.01] * 50])
    plain, padded = reward("token_entropy", "mean").score(group).tolist()
    assert padded > plain
    plain, padded = reward("token_entropy", "sum").score(group).tolist()
    assert padded < plain


@pytest.mark.parametrize("name", CERTAINTY)
def test_an_absent_statistic_is_an_error_and_never_a_zero(name, make_group):
    wanted = STATISTIC[name]
    other = "lse"
    group = make_group("q17", **{other: [[0.5], [0.5]]})
    with pytest.raises(MissingSignalError, match=rf"{name}.*{wanted}.*sample 0.*q17"):
        reward(name, "mean").score(group)
    group.samples[0].stats = TokenStats(**{wanted: torch.zeros(1)})
    with pytest.raises(MissingSignalError, match=rf"{name}.*{wanted}.*sample 1.*q17"):
        reward(name, "mean").score(group)


def test_a_statistic_of_another_length_is_an_error(make_group):
    group = make_group("q3", logp=[[-1.0, -1.0], [-1.0]])
    group.samples[1].tokens.append(2)
    with pytest.raises(MissingSignalError, match="sample 1 of prompt 'q3' has 2 tokens and 'logp' for 1"):
        reward("trajectory_entropy", "sum").score(group)


def test_an_empty_response_is_an_error_and_not_the_most_certain_one(make_group):
    group = make_group("q3", logp=[[-1.0], []])
    with pytest.raises(MissingSignalError, match="sample 1 of prompt 'q3' has 0 tokens"):
        reward("trajectory_entropy", "sum").score(group)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_names_reward_prompt_and_sample(value, make_group):
    combined = build_terms(
        RewardSection(terms={"sure": {"name": "token_entropy", "aggregation": "mean"}}), advantage="grpo", seed=0
    )
    groups = [make_group("fine", entropy=[[1.0], [2.0]]), make_group("q9", entropy=[[1.0], [1.0], [1.0, value]])]
    with pytest.raises(NonFiniteScoreError, match=r"token_entropy.*sure.*sample 2 of prompt 'q9'"):
        combined.score_groups(groups)


def test_a_groups_scores_do_not_depend_on_the_groups_beside_it(make_group):
    generator = torch.Generator().manual_seed(0)
    groups = [
        make_group(str(g), logp=[(-torch.rand(1 + (g * i) % 7, generator=generator)).tolist() for i in range(5)])
        for g in range(4)
    ]
    for name, options in [("trajectory_entropy", {"aggregation": "mean"}), ("probability", {})]:
        section = RewardSection(terms={"main": {"name": name, **options}})
        combined = build_terms(section, advantage="rloo", seed=0)
        together = combined.score_groups(groups)
        for group, result in zip(groups, together, strict=True):
            assert torch.equal(result.total, combined.score(group).total)


class TestProbability:
    def combined(self, advantage, **term):
        section = RewardSection(terms={"main": {"name": "probability", **term}})
        return build_terms(section, advantage=advantage, seed=0)

    def test_it_is_the_product_of_the_token_probabilities(self, make_group):
        group = make_group(logp=[[math.log(0.5), math.log(0.25)], [math.log(0.9)]])
        scores = self.combined("rloo").score(group).total
        torch.testing.assert_close(scores, torch.tensor([0.125, 0.9], dtype=torch.float64), rtol=1e-6, atol=0)

    def test_a_thousand_tokens_keep_their_signal_under_std_normalised_advantages(self, make_group):
        lengths = [1000, 1003, 1001, 1006]
        rows = [[math.log(0.9)] * t for t in lengths]
        group = make_group(logp=rows)
        naive = torch.tensor([sum(row) for row in rows], dtype=torch.float32).exp()
        assert grpo(naive[None]).abs().max() == 0  # float32 has lost every one of them

        getcontext().prec = 60
        exact = [Decimal(float(torch.tensor(math.log(0.9)))) * t for t in lengths]
        p = [x.exp() for x in exact]
        mean = sum(p) / len(p)
        std = (sum((x - mean) ** 2 for x in p) / (len(p) - 1)).sqrt()
        expected = torch.tensor([[float((x - mean) / std) for x in p]])

        result = self.combined("grpo").score(group)
        torch.testing.assert_close(grpo(result.total[None]), expected, rtol=1e-4, atol=1e-4)
        assert result.counts["main/underflow_float32"] == 1.0
        assert result.counts["main/underflow"] == 0.0

    def test_shifting_changes_no_advantage_where_nothing_underflows(self, make_group):
        group = make_group(logp=[[-0.3, -0.1], [-1.0], [-0.2, -0.2, -0.9]])
        shifted = self.combined("grpo").score(group).total
        raw = self.combined("rloo").score(group).total
        assert not torch.allclose(shifted, raw)
        torch.testing.assert_close(grpo(shifted[None]), grpo(raw[None]), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("advantage", ["rloo", "dr_grpo"])
    def test_where_the_scale_matters_float64_keeps_them_apart(self, advantage, make_group):
        group = make_group(logp=[[-0.1] * 2000, [-0.1] * 1900])  # e^-200, e^-190: zero in float32
        result = self.combined(advantage).score(group)
        assert 0 < float(result.total[0]) < float(result.total[1])
        torch.testing.assert_close(
            result.total.log(), torch.tensor([-200.0, -190.0], dtype=torch.float64), rtol=1e-6, atol=0
        )
        assert result.counts["main/underflow_float32"] == 1.0

    def test_what_float64_loses_too_is_counted(self, make_group):
        result = self.combined("rloo").score(make_group(logp=[[-800.0], [-1.0]]))
        assert result.total[0] == 0
        assert result.counts["main/underflow"] == 0.5
        assert result.counts["main/underflow_float32"] == 0.5

    @pytest.mark.parametrize("scale", [-150.0, -104.0, -103.9, -100.0])
    def test_the_float32_count_is_that_of_float32(self, scale, make_group):
        result = self.combined("rloo").score(make_group(logp=[[scale]]))
        assert result.counts["main/underflow_float32"] == float(torch.tensor(scale).exp() == 0)

    def test_it_is_shifted_only_where_a_groups_scale_is_lost_anyway(self, make_group):
        group = make_group(logp=[[-2.0], [-3.0]], classes=[0, 0])
        raw = torch.tensor([-2.0, -3.0], dtype=torch.float64).exp()

        def scores(terms, **kwargs):
            return build_terms(RewardSection(terms=terms), seed=0, **kwargs).score(group).total

        alone = {"main": {"name": "probability"}}
        mixed = {**alone, "other": {"name": "format"}}
        torch.testing.assert_close(scores(alone, advantage="grpo"), raw / raw.max())
        torch.testing.assert_close(scores(alone, advantage="rloo"), raw)
        torch.testing.assert_close(scores(mixed, advantage="grpo") - scores(mixed, advantage="rloo"), 0 * raw)
        torch.testing.assert_close(scores(alone, advantage="grpo", kl_in_reward=True), raw)
        assert get_advantage("grpo").scale_free

    def test_a_normalised_term_keeps_its_signal_beside_others(self, make_group):
        group = make_group(logp=[[-200.0], [-201.0], [-203.0]], classes=[0, 0, 0])
        terms = {"main": {"name": "probability", "normalize": True, "weight": -2.0}, "other": {"name": "format"}}
        result = build_terms(RewardSection(terms=terms), advantage="rloo", seed=0).score(group)
        own = result.total - result.by_term["other"]
        torch.testing.assert_close(own, -2 * grpo(torch.tensor([[1.0, math.exp(-1), math.exp(-3)]]))[0].double())

    def test_metrics_report_the_probability_itself(self, make_group):
        group = make_group(logp=[[-100.0]] * 4, classes=[0, 0, 1, 1])
        result = self.combined("grpo", weight=3.0).score(group)
        assert result.total.tolist() == [3.0] * 4
        metrics = rates(rollout_sums([group], [result.proxy], [result.total])) | rates(term_sums([group], [result]))
        assert metrics["reward/proxy"] == pytest.approx(3 * math.exp(-100), rel=1e-9)
        assert metrics["term/main"] == pytest.approx(math.exp(-100), rel=1e-9)
        assert metrics["term/main/log"] == -100
        varied = self.combined("grpo").score(make_group(logp=[[-100.0], [-101.0]]))
        assert varied.counts["main/zero_variance"] == 0

    @pytest.mark.parametrize("weight", [1.0, -0.5])
    def test_votes_that_are_not_trained_on_take_no_signal_from_those_that_are(self, weight, make_group):
        logs = [-10.0, -50.0, -51.0, -900.0]
        result = self.combined("grpo", weight=weight).score(make_group(logp=[[each] for each in logs]))
        assert grpo(result.total[None, 1:]).abs().max() == 0  # float64 on unshifted ones would not do better
        getcontext().prec = 60
        p = [Decimal(each).exp() for each in logs[1:]]
        mean = sum(p) / 3
        std = (sum((x - mean) ** 2 for x in p) / 2).sqrt()
        expected = torch.tensor([[math.copysign(1, weight) * float((x - mean) / std) for x in p]])
        torch.testing.assert_close(grpo(result.among([1, 2, 3])[None]), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(result.among(range(4)), result.total)
