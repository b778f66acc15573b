"""Evaluation estimators against brute force, enumeration and theory."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from megatron_urlvr.analysis.estimators import (
    avg_at_n,
    balanced_accuracy,
    maj_at_k,
    maj_at_n,
    mean_and_se,
    parse_rate,
    pass_at_k,
    ratio_and_se,
    summarise,
)


def random_set(seed, problems=40, n=6):
    """Answers 0..3 or none; 0 is right."""
    rng = np.random.default_rng(seed)
    answers = rng.integers(-1, 4, size=(problems, n))
    return answers == 0, answers


@pytest.mark.parametrize(
    ("said", "right", "expected"),
    [
        ([True, True, False], [True, True, False], 1.0),
        ([True, True, True, True], [True, False, False, False], 0.5),  # yes to everything, whatever the shares
        ([True, None, False, None], [True, True, False, False], 0.5),  # no verdict is no hit
        ([True, False, True], [True, True, False], 0.25),
        ([True], [True], None),
    ],
)
def test_balanced_accuracy_weighs_right_and_wrong_alike(said, right, expected):
    assert balanced_accuracy(said, right) == expected


def test_maj_at_n_is_that_of_counting_with_ties_shared():
    correct, answers = random_set(0, problems=300)
    expected = []
    for row in answers.tolist():
        counts = Counter(a for a in row if a != -1)
        best = [a for a, c in counts.items() if c == max(counts.values())]
        expected.append(float(Fraction(best.count(0), len(best))) if best else 0.0)
    np.testing.assert_allclose(maj_at_n(answers, correct), expected)
    assert {0.5, 1.0, 0.0} <= set(expected)


def test_maj_at_n_knows_only_classes_not_what_they_are_called():
    correct, answers = random_set(1)
    renamed = np.where(answers == -1, -1, (answers * 7 + 3) % 29)
    np.testing.assert_array_equal(maj_at_n(answers, correct), maj_at_n(renamed, correct))


def test_unparsable_samples_never_outvote_an_answer():
    assert maj_at_n([[-1, -1, -1, 2]], [[0, 0, 0, 1]]).tolist() == [1.0]
    assert maj_at_n([[-1, -1, -1, -1]], [[0, 0, 0, 0]]).tolist() == [0.0]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_sample(k):
    correct, _ = random_set(2)
    expected = [np.mean([any(subset) for subset in itertools.combinations(row, k)]) for row in correct.tolist()]
    np.testing.assert_allclose(pass_at_k(correct, k), expected, atol=1e-12)


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not():
    p, n, k = 0.2, 8, 4
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    rows = np.array([[True] * c + [False] * (n - c) for c in range(n + 1)])
    truth = 1 - (1 - p) ** k
    assert np.dot(chance, pass_at_k(rows, k)) == pytest.approx(truth)
    plug_in = 1 - (1 - rows.mean(axis=1)) ** k
    assert abs(np.dot(chance, plug_in) - truth) > 0.01


def test_pass_at_k_survives_many_samples():
    correct = np.zeros((1, 4096), dtype=bool)
    correct[0, :3] = True
    exact = 1 - Fraction(math.comb(4093, 1024), math.comb(4096, 1024))
    assert pass_at_k(correct, 1024)[0] == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("k", [0, 7])
def test_pass_at_k_needs_k_samples(k):
    with pytest.raises(ValueError, match=f"pass@{k} .* 6 samples"):
        pass_at_k(random_set(0)[0], k)


def test_shares_are_counted():
    assert avg_at_n([[1, 0, 0, 1], [0, 0, 0, 0]]).tolist() == [0.5, 0.0]
    assert parse_rate([[0, -1, 2, -1], [0, 0, 0, 0]]).tolist() == [0.5, 1.0]


def test_the_standard_error_of_a_mean_is_the_textbooks():
    values = np.random.default_rng(5).random(400)
    mean, se = mean_and_se(values, seed=0, resamples=4000)
    assert mean == pytest.approx(values.mean())
    assert se == pytest.approx(values.std() / math.sqrt(400), rel=0.05)


def test_the_standard_error_of_a_ratio_is_that_of_resampling_by_hand():
    rng = np.random.default_rng(6)
    parsed = rng.integers(0, 5, size=50)
    right = np.minimum(rng.integers(0, 5, size=50), parsed)
    ratio, se = ratio_and_se(right, parsed, seed=1, resamples=4000)
    assert ratio == pytest.approx(right.sum() / parsed.sum())
    draws = rng.integers(0, 50, size=(4000, 50))
    assert se == pytest.approx((right[draws].sum(axis=1) / parsed[draws].sum(axis=1)).std(), rel=0.08)


def test_errors_come_from_problems_not_from_samples():
    # the samples of a problem agree: a thousand of them know no more than one
    once = np.random.default_rng(7).random((30, 1)) < 0.5
    often = np.repeat(once, 1000, axis=1)
    assert mean_and_se(avg_at_n(often), seed=0) == mean_and_se(avg_at_n(once), seed=0)


def test_errors_are_the_same_for_the_same_seed_and_another_for_another():
    values = np.random.default_rng(8).random(30)
    assert mean_and_se(values, seed=3) == mean_and_se(values, seed=3)
    assert mean_and_se(values, seed=3)[1] != mean_and_se(values, seed=4)[1]


def test_two_metrics_are_resampled_together():
    values = np.random.default_rng(9).random(30)
    assert mean_and_se(1 - values, seed=0)[1] == pytest.approx(mean_and_se(values, seed=0)[1])


def test_a_ratio_without_cases_is_none():
    assert ratio_and_se([0, 0], [0, 0], seed=0) == (None, 0.0)
    ratio, se = ratio_and_se([0, 1], [0, 1], seed=0)  # some draws hold the first problem alone
    assert ratio == 1.0
    assert se == 0.0


def test_a_summary_holds_every_metric_by_its_name():
    correct, answers = random_set(4)
    summary = summarise(correct, answers, pass_k=[2], seed=0)
    names = ["avg@6", "maj@6", "pass@2", "parse_rate", "accuracy_given_parsed"]
    assert list(summary) == [key for name in names for key in (name, f"{name}_se")]
    assert summary["accuracy_given_parsed"] == pytest.approx(correct.sum() / (answers != -1).sum())
    assert summary["avg@6"] == pytest.approx(correct.mean())
    assert summary["avg@6"] == pytest.approx(summary["parse_rate"] * summary["accuracy_given_parsed"])


def test_a_policy_that_answers_nothing_has_no_accuracy_given_parsed():
    summary = summarise(np.zeros((3, 2)), np.full((3, 2), -1))
    assert "accuracy_given_parsed" not in summary
    assert summary["maj@2"] == 0.0
    assert summary["parse_rate"] == 0.0


@pytest.mark.parametrize("shape", [(3,), (0, 4), (3, 0)])
def test_an_empty_or_flat_table_is_refused(shape):
    with pytest.raises(ValueError, match="problems, samples"):
        avg_at_n(np.zeros(shape))


def test_tables_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        maj_at_n(np.zeros((2, 3)), np.zeros((2, 4)))


def test_maj_at_k_is_the_average_over_all_subsets_within_its_draws():
    correct, answers = random_set(5, problems=12, n=8)
    exact = np.mean(
        [
            maj_at_n(answers[:, list(chosen)], correct[:, list(chosen)])
            for chosen in itertools.combinations(range(8), 3)
        ],
        axis=0,
    )
    found = maj_at_k(answers, correct, 3, subsets=4000)
    np.testing.assert_allclose(found, exact, atol=5 * 0.5 / math.sqrt(4000))
    np.testing.assert_allclose(maj_at_k(answers, correct, 1, subsets=4000), avg_at_n(correct), atol=0.04)


def test_maj_at_k_wants_twice_as_many_samples():
    correct, answers = random_set(6, n=6)
    for k in (0, 4, 6):
        with pytest.raises(ValueError, match="needs at least"):
            maj_at_k(answers, correct, k)
    assert "maj@3" in summarise(correct, answers, maj_k=[3])
