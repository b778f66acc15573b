"""Rewards on random groups against brute forces that share nothing with them: answers are written, read, voted on and
judged here by tables and counting. Samples stand in any order, and ties go to the lowest index."""

import math
import random
from collections import Counter
from fractions import Fraction

import pytest
import torch
from scripted import Scripted, fetch, provider, responses

from megatron_urlvr.data.tasks import get_task
from megatron_urlvr.rewards import get_reward

ROUNDS = 50
SPELLINGS = {
    "A": ["#9-2", "#(9)-2", "#9 - 2", "try #2#9-2"],
    "B": ["#9+2", "#2+9", "#(2)+(9)"],
    "C": ["#2*9", "#9*2"],
    "none": ["", "9-2", "#9-", "#nine"],
}
"""Responses by what they answer."""


def make(name, **options):
    cls = get_reward(name)
    return cls(cls.Options(**options))


def close(scores, expected):
    assert scores.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def elected(answers, order=None):
    """The answer that most give, of several the one that was first given by index; None where nobody answers."""
    given = [answers[i] for i in (order or range(len(answers))) if answers[i] not in (None, "none")]
    return max(given, key=lambda a: (given.count(a), -given.index(a)), default=None)


@pytest.fixture
def random_votes(make_group):
    """(group, answers, order): answers by place, None without one, and the places in the order of their indices."""
    rng = random.Random(21)

    def one(g):
        n = rng.randint(1, 10)
        answers = [rng.choice([None, *"abcd"[: rng.randint(1, 4)]]) for _ in range(n)]
        classes = [None if a is None else answers.index(a) for a in answers]
        entropy = [[rng.uniform(0, 3) for _ in range(rng.randint(1, 9))] for _ in range(n)]
        group = make_group(f"q{g}", classes=classes, entropy=entropy)
        indices = rng.sample(range(n), n)
        for sample, index in zip(group.samples, indices, strict=True):
            sample.index = index
        return group, answers, sorted(range(n), key=indices.__getitem__)

    return [one(g) for g in range(ROUNDS)]


def test_rent(random_votes):
    for group, answers, _ in random_votes:
        entropies = [sample.stats.entropy.tolist() for sample in group.samples]
        means = [-math.fsum(own) / len(own) for own in entropies]
        malformed = -2.5
        expected = [malformed if a is None else mean for a, mean in zip(answers, means, strict=True)]
        close(make("rent", malformed=malformed).score(group), expected)


def test_anti_majority(random_votes):
    ties = 0
    for group, answers, order in random_votes:
        winner = elected(answers, order)
        close(make("anti_majority").score(group), [float(a is not None and a != winner) for a in answers])
        ties += winner != elected(answers)
    assert ties  # the order of arrival would have given another winner


def test_incorrect(random_votes):
    for truth in "ab":
        for group, answers, order in random_votes:
            group.signals["correct"] = torch.tensor([float(a == truth) for a in answers])
            wrong = [None if a == truth else a for a in answers]
            winner = elected(wrong, order)
            close(make("incorrect").score(group), [float(a is not None and a == winner) for a in wrong])
            close(make("incorrect", wrong="any").score(group), [float(a is not None) for a in wrong])


def test_a_confirmed_gated_vote(random_votes):
    """A check on any response that gives the winner is enough, and checks on others are nothing."""
    rng = random.Random(2)
    for group, answers, order in random_votes:
        winner = elected(answers, order)
        checks = [float(rng.random() < 0.3) for _ in answers]
        for place, answer in enumerate(answers):
            if answer == winner and winner is not None:
                checks[place] = float(rng.random() < 0.5)
        members = [place for place, a in enumerate(answers) if a == winner and winner is not None]
        if members:
            checks[rng.choice(members)] = 1.0
        group.signals["check"] = torch.tensor(checks)
        close(make("gated_vote").score(group), [float(winner is not None and a == winner) for a in answers])


def test_probability_disparity(make_group):
    """From distributions over 13 entries in float64; responses of one token, answers at either end, and none."""
    generator = torch.Generator().manual_seed(5)
    rng = random.Random(5)
    for g in range(ROUNDS):
        gaps, places, expected = [], [], []
        for _ in range(rng.randint(1, 8)):
            p = (torch.randn(rng.randint(1, 12), 13, generator=generator, dtype=torch.float64) * 3).softmax(-1)
            ranked = [sorted(row, reverse=True) for row in p.tolist()]
            gaps.append([row[0] - row[1] for row in ranked])
            first = rng.randrange(len(ranked))
            last = rng.randint(first + 1, len(ranked))
            places.append((first, last) if rng.random() < 0.8 else (-1, -1))
            own = gaps[-1][first:last]
            expected.append(math.fsum(own) / len(own) if places[-1][0] >= 0 else 0.125)
        group = make_group(f"q{g}", top2_gap=gaps)
        group.signals["answer_start"] = torch.tensor([float(first) for first, _ in places])
        group.signals["answer_end"] = torch.tensor([float(last) for _, last in places])
        close(make("probability_disparity", no_answer=0.125).score(group), expected)


def spelt(rng, answers):
    return [rng.choice(SPELLINGS[answer]) for answer in answers]


@pytest.mark.parametrize("of", ["prompt", "paraphrase"])
def test_co_rewarding(of):
    """The other vote's winner is told by its name in the table, the responses are compared by theirs."""
    rng = random.Random(8)
    for _ in range(ROUNDS):
        mine, others = ([rng.choice([*SPELLINGS]) for _ in range(n)] for n in (rng.randint(1, 8), 5))
        said = spelt(rng, others)
        question = "2,9=7:" if of == "paraphrase" else "9,2=7:"
        voters = Scripted(lambda text, k, said=said, question=question: said[k] if text == question else "#9-2-2")
        votes = provider("votes", voters, of=of, weights="ema", samples=5, max_new_tokens=8)
        group = fetch(votes, responses(spelt(rng, mine), paraphrase_tokens=list(map(ord, "2,9=7:"))))
        winner = elected(others)
        scores = make("co_rewarding").score(group)
        close(scores, [float(winner is not None and a == winner) for a in mine])
        assert make("co_rewarding").counts([group], [scores]) == [{"no_winner": float(winner is None)}]


VERDICTS = {
    "yes": [r"\boxed{True}", r"so \boxed{ true }", r"\boxed{True}, yes: \boxed{True}"],
    "no": [r"\boxed{False}", r"\boxed{FALSE}"],
    "neither": ["True", "", r"\boxed{maybe}", r"\boxed{True} or \boxed{False}", r"\boxed{True"],
}


def test_self_verification():
    rng = random.Random(9)
    for _ in range(ROUNDS):
        n, k = rng.randint(1, 6), rng.randint(1, 7)
        given = [[rng.choice([*VERDICTS]) for _ in range(k)] for _ in range(n)]
        said = [[rng.choice(VERDICTS[verdict]) for verdict in own] for own in given]
        judge = Scripted(lambda text, j, said=said: said[int(text.partition("response ")[2][0])][j])
        asked = provider("judge", judge, samples=k, max_new_tokens=8, temperature=1.0)
        group = fetch(asked, responses([f"response {i}" for i in range(n)]))
        scores = make("self_verification").score(group)
        close(scores, [own.count("yes") / k for own in given])
        (counts,) = make("self_verification").counts([group], [scores])
        assert counts["unparsable"] == pytest.approx(sum(own.count("neither") for own in given) / (n * k))
        assert counts["unanimous"] == float(len({own.count("yes") for own in given}) == 1)


@pytest.mark.parametrize("checker", ["answer", "numbers", "value"])
def test_program(checker):
    """Countdown's checkers, against Python's own arithmetic on fractions and a count of the numbers."""
    rng, paid = random.Random(10), Counter()
    for _ in range(ROUNDS):
        numbers = tuple(rng.randint(1, 9) for _ in range(3))
        other = [tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 4))) for _ in range(6)]
        used = [rng.choice([numbers, numbers, own]) for own in other]
        texts = [_expression(rng, rng.sample(own, len(own))) for own in used]
        values = [_value(text) for text in texts]
        target = next((int(value) for value in values if value is not None and value.denominator == 1), 1)
        cut = [rng.random() < 0.1 for _ in texts]
        written = [f"I try. #{text}" if not half else "I try." for text, half in zip(texts, cut, strict=True)]
        group = responses(written, numbers=numbers, target=target)
        fetch(provider("checker", task=get_task("countdown", {}), checker=checker), group)
        fits = [Counter(own) == Counter(numbers) for own in used]
        reaches = [value == target for value in values]
        holds = {"numbers": fits, "value": reaches, "answer": [a and b for a, b in zip(fits, reaches, strict=True)]}
        expected = [float(ok and not half) for ok, half in zip(holds[checker], cut, strict=True)]
        close(make("program").score(group), expected)
        paid.update(expected)
    assert min(paid.values()) > 20


def _expression(rng, numbers):
    if len(numbers) == 1:
        return str(numbers[0])
    at = rng.randint(1, len(numbers) - 1)
    return f"({_expression(rng, numbers[:at])}{rng.choice('+-*/')}{_expression(rng, numbers[at:])})"


def _value(text):
    try:
        return eval("".join(f"Fraction({c})" if c.isdigit() else c for c in text), {"Fraction": Fraction})
    except ZeroDivisionError:
        return None
