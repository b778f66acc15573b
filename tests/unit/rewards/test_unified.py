"""Which rewards are instances of the study's unified form, with which arguments, and where its statements fail."""

import math
import random

import pytest
import scripted
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


def test_an_ungated_semantic_entropy_is_the_soft_vote_on_answers_that_can_be_read(make_group):
    """And where the gate closes, or a response has no answer, it is no instance: it gives 0, or what it is told to."""
    rng, gated = random.Random(1), 0
    reward = make("semantic_entropy", no_meaning=-0.5)
    for _ in range(50):
        n = rng.randint(2, 8)
        answers = [rng.choice([None, *range(rng.randint(1, 4))]) for _ in range(n)]
        classes = [None if a is None else answers.index(a) for a in answers]
        group = make_group(classes=classes)
        scores = reward.score(group)
        ungated = not reward.counts([group], [scores])[0]["gated"]
        gated += not ungated
        shares = torch.tensor([[classes.count(c) / n for c in range(n)]], dtype=torch.float64)
        soft = make("srt_vote").score(group).tolist()
        for c, score, share in zip(classes, scores.tolist(), soft, strict=True):
            if c is None:
                assert score == -0.5
            else:
                assert score == pytest.approx(unified(delta([c], n), shares, sigma=-1, psi="exp") if ungated else 0)
                assert not ungated or score == pytest.approx(share)
    assert 0 < gated < 50


def test_co_rewarding_is_an_instance_with_the_other_votes_winner_as_first_argument():
    """Answers are numbered over both sides; a winner that nobody here gave has a column of its own."""
    names = ["#9-2", "#9+2", "#9*2", "#2-9"]
    rng = random.Random(2)
    for _ in range(50):
        mine, others = ([rng.randrange(4) for _ in range(n)] for n in (6, 5))
        voters = scripted.Scripted(lambda text, k, others=others: names[others[k]])
        votes = scripted.provider("votes", voters, of="prompt", weights="ema", samples=5, max_new_tokens=8)
        group = scripted.fetch(votes, scripted.responses([names[answer] for answer in mine]))
        winner = max(others, key=lambda a: (others.count(a), -others.index(a)))
        expected = [unified(delta([winner], 4), delta([answer], 4), sigma=-1, psi="exp") for answer in mine]
        assert make("co_rewarding").score(group).tolist() == expected


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
