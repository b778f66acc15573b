"""The vote, against a brute force and against the defects of published ones."""

import random
from collections import Counter

import pytest

from megatron_urlvr.rewards import MissingSignalError, get_reward, vote, vote_of


def brute_force(classes):
    """Winner and its count: most members; of equals, the one met first."""
    counts = Counter(c for c in classes if c is not None)
    best = None
    for c in classes:
        if c is not None and (best is None or counts[c] > counts[best]):
            best = c
    return best, counts[best] if best is not None else 0


def test_the_vote_is_that_of_a_brute_force():
    rng = random.Random(1)
    for _ in range(300):
        answers = [rng.choice([None, 0, 1, 2, 3]) for _ in range(rng.randint(1, 9))]
        first = {a: answers.index(a) for a in set(answers) - {None}}
        classes = [None if a is None else first[a] for a in answers]
        outcome = vote(classes)
        winner, count = brute_force(classes)
        assert (outcome.winner, outcome.count) == (winner, count)
        assert outcome.ratio == pytest.approx(count / len(classes))
        assert set(outcome.tied) == {c for c in first.values() if classes.count(c) == count}
        assert outcome.tied[:1] == (() if winner is None else (winner,))


def test_what_cannot_be_parsed_never_wins_but_counts_in_the_ratio():
    outcome = vote([None, None, None, 3, None])
    assert outcome.winner == 3
    assert outcome.ratio == pytest.approx(1 / 5)


def test_ties_go_to_the_lowest_sample_index_whatever_the_order_of_arrival(make_group):
    group = make_group(classes=[0, 1, 1, 0, None])
    for seed in range(10):
        order = list(range(5))
        random.Random(seed).shuffle(order)
        shuffled = make_group(classes=[group.classes[i] for i in order])
        for sample, i in zip(shuffled.samples, order, strict=True):
            sample.index = i
        outcome = vote_of(shuffled)
        assert outcome.winner == 0
        assert outcome.tied == (0, 1)


def test_a_group_without_any_answer_gets_zero_and_is_counted(make_group):
    group = make_group(classes=[None, None, None])
    reward = get_reward("majority_vote")()
    scores = reward.score(group)
    assert scores.tolist() == [0, 0, 0]
    assert vote(group.classes).winner is None
    assert reward.counts([group], [scores]) == [{"no_answer_groups": 1.0, "ties": 0.0}]


def test_unparsable_samples_keep_their_place(make_group):
    # dropping them from the list of answers would shift the rewards of those behind
    assert get_reward("majority_vote")().score(make_group(classes=[None, 1, 2, 1, None])).tolist() == [0, 1, 0, 1, 0]


def test_the_reward_is_membership_of_the_class_and_never_a_second_grading(make_group):
    group = make_group(classes=[0, 0, 2])
    group.samples[2].answer = group.samples[0].answer  # a second grader might call it equal; the vote did not
    assert get_reward("majority_vote")().score(group).tolist() == [1, 1, 0]


def test_answers_that_were_not_graded_are_an_error(make_group):
    group = make_group("q5", lengths=[1, 1])
    with pytest.raises(MissingSignalError, match=r"majority_vote.*q5"):
        get_reward("majority_vote")().score(group)
