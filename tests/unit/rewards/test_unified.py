"""Which rewards are instances of the study's unified form, with which arguments, and where its statements fail."""

import math
import random

import pytest
import torch

from megatron_urlvr.rewards import get_reward
from megatron_urlvr.rewards.unified import unified
from megatron_urlvr.types import TokenStats

V = 17


def make(name, **options):
    cls = get_reward(name)
    return cls(cls.Options(**options))


def delta(index, size=V):
    return torch.nn.functional.one_hot(torch.as_tensor(index), size).double()


@pytest.fixture
def responses(make_group):
    """(group, distributions [T, V] of each response, tokens of each)."""
    generator = torch.Generator().manual_seed(11)
    policies = [(torch.randn(t, V, generator=generator, dtype=torch.float64) * 2).softmax(-1) for t in (1, 4, 9)]
    tokens = [torch.multinomial(p, 1, generator=generator)[:, 0] for p in policies]
    group = make_group(lengths=[len(p) for p in policies])
    for sample, p, y in zip(group.samples, policies, tokens, strict=True):
        sample.stats = TokenStats(
            logp=p.log().gather(1, y[:, None])[:, 0].float(),
            entropy=-(p * p.log()).sum(-1).float(),
            self_certainty=(-p.log().mean(-1) - math.log(V)).float(),
        )
    return group, policies, tokens


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
def test_the_three_certainty_rewards_are_instances(responses, aggregation):
    group, policies, tokens = responses
    constant = [math.log(V) * (1 if aggregation == "mean" else len(p)) for p in policies]
    uniform = [torch.full_like(p, 1 / V) for p in policies]
    instances = {
        "self_certainty": [
            unified(u, p, sigma=1, aggregation=aggregation) - c
            for u, p, c in zip(uniform, policies, constant, strict=True)
        ],
        "token_entropy": [unified(p, p, sigma=-1, aggregation=aggregation) for p in policies],
        "trajectory_entropy": [
            unified(delta(y), p, sigma=-1, aggregation=aggregation) for p, y in zip(policies, tokens, strict=True)
        ],
    }
    for name, expected in instances.items():
        scores = make(name, aggregation=aggregation).score(group).tolist()
        assert scores == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_probability_is_the_exponential_of_a_sum_and_not_of_a_mean(responses):
    group, policies, tokens = responses
    scores = make("probability").score(group).tolist()
    pairs = list(zip(policies, tokens, strict=True))
    assert scores == pytest.approx(
        [unified(delta(y), p, sigma=-1, aggregation="sum", psi="exp") for p, y in pairs], rel=1e-5
    )
    means = [unified(delta(y), p, sigma=-1, aggregation="mean", psi="exp") for p, y in pairs]
    assert scores[1:] != pytest.approx(means[1:], rel=0.1)


def test_the_vote_is_an_instance_with_the_responses_own_answer_as_second_argument_and_with_no_other(make_group):
    rng = random.Random(0)
    for _ in range(50):
        answers = [rng.randrange(3) for _ in range(8)]
        classes = [answers.index(a) for a in answers]
        group = make_group(classes=classes)
        vote = make("majority_vote").score(group).tolist()
        winner = max(set(classes), key=lambda c: (classes.count(c), -c))
        first = delta([winner], 8)
        assert vote == [unified(first, delta([c], 8), sigma=-1, psi="exp") for c in classes]
        shares = torch.tensor([[classes.count(c) / 8 for c in range(8)]], dtype=torch.float64)
        # the policy's (here: the group's) distribution over answers gives every response the winner's share
        constant = [unified(first, shares, sigma=-1, psi="exp") for _ in classes]
        assert constant == pytest.approx([classes.count(winner) / 8] * 8)
        soft = make("srt_vote").score(group).tolist()
        assert soft == pytest.approx([unified(delta([c], 8), shares, sigma=-1, psi="exp") for c in classes])


class TestMonotonicity:
    """Proposition 1 of the study: for sigma = -1, the more probable of two responses has the higher reward."""

    def pair(self, make_group, first, second):
        return make_group(logp=[first, second])

    @pytest.mark.parametrize("name", ["trajectory_entropy", "probability"])
    def test_it_holds_for_sums(self, name, make_group):
        rng = random.Random(4)
        options = {"aggregation": "sum"} if name == "trajectory_entropy" else {}
        for _ in range(200):
            rows = [[-rng.random() for _ in range(rng.randint(1, 9))] for _ in range(2)]
            a, b = make(name, **options).score(make_group(logp=rows)).tolist()
            assert (a > b) == (sum(rows[0]) > sum(rows[1]))

    def test_it_holds_for_means_of_responses_of_one_length(self, make_group):
        rng = random.Random(4)
        for _ in range(200):
            rows = [[-rng.random() for _ in range(5)] for _ in range(2)]
            a, b = make("trajectory_entropy", aggregation="mean").score(make_group(logp=rows)).tolist()
            assert (a > b) == (sum(rows[0]) > sum(rows[1]))

    def test_it_fails_for_means_of_different_lengths(self, make_group):
        a, b = make("trajectory_entropy", aggregation="mean").score(make_group(logp=[[-1.0], [-0.2] * 10])).tolist()
        assert a < b  # and yet the first is e times as probable

    def test_it_fails_for_token_entropy_at_any_length(self):
        sure = torch.tensor([[0.02, 0.98]], dtype=torch.float64)  # samples its second choice: unlikely, entropy low
        unsure = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
        rare, common = float(sure[0, 0]), float(unsure[0, 0])
        assert rare < common
        assert unified(sure, sure, sigma=-1) > unified(unsure, unsure, sigma=-1)


def test_disparity_is_not_given_by_any_one_cross_entropy_of_the_form():
    """For each first argument of the table: two distributions that agree in it and differ in their first two
    probabilities."""

    def gap(p):
        first, second = p.topk(2).values
        return float(first - second)

    one = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    for q_of in (lambda p: delta([3], 4)[0], lambda p: torch.full_like(p, 0.25), lambda p: p):
        wanted = unified(q_of(one)[None], one[None], sigma=-1)

        def at(third):
            return torch.tensor([0.38, 0.52 - third, third, 0.1], dtype=torch.float64)

        def off(third):
            return unified(q_of(at(third))[None], at(third)[None], sigma=-1) - wanted  # noqa: B023

        low, high = 1e-9, 0.26  # another first probability; the third is found by bisection
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (low, middle) if off(low) * off(middle) <= 0 else (middle, high)
        assert abs(off(low)) < 1e-9
        assert abs(gap(at(low)) - gap(one)) > 0.01
