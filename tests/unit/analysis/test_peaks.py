"""Peaks chosen on one set and measured on another: no bias, and intervals that cover."""

import json

import numpy as np
import pytest

from megatron_urlvr.analysis.peaks import (
    ProblemAccuracy,
    bootstrap_mean_interval,
    load_problem_accuracy,
    peak_statistics,
)
from megatron_urlvr.analysis.runs import RunError


def problems(accuracy, n_problems, seed, samples=4):
    """Binomial results of `n_problems` problems at every step, `[T, P]`."""
    rng = np.random.default_rng(seed)
    correct = rng.binomial(samples, np.asarray(accuracy)[:, None], size=(len(accuracy), n_problems))
    return ProblemAccuracy(np.arange(len(accuracy)) * 5, correct / samples)


def test_start_peak_and_end_are_read_off_the_measuring_set_at_the_selecting_sets_peak():
    select = ProblemAccuracy(np.array([0, 5, 10]), np.array([[0, 0.5], [1, 0.5], [0, 0]]))
    measure = ProblemAccuracy(np.array([0, 5, 10]), np.array([[0.25, 0.25], [0.5, 0.25], [1, 1]]))
    found = peak_statistics(select, measure, seed=0)
    assert (found.peak_step, found.start, found.peak, found.end, found.problems) == (5, 0.25, 0.375, 1.0, 2)
    assert found.difference == pytest.approx(0.125)


def test_without_any_rise_the_measured_difference_is_centred_on_zero_where_the_naive_one_is_not():
    flat = [0.3] * 21
    naive, measured = [], []
    for seed in range(60):
        select, measure = problems(flat, 128, seed), problems(flat, 128, 1000 + seed)
        means = select.accuracy.mean(axis=1)
        naive.append(means.max() - means[0])
        measured.append(peak_statistics(select, measure, resamples=10).difference)
    standard_error = np.std(measured, ddof=1) / np.sqrt(len(measured))
    assert abs(np.mean(measured)) < 3 * standard_error
    assert np.mean(naive) > 0.02


def test_the_interval_covers_the_true_difference_about_as_often_as_it_says():
    truth = [0.3, 0.35]
    covered = 0
    for seed in range(200):
        found = peak_statistics(problems(truth, 200, seed), problems(truth, 200, 5000 + seed), seed=seed, resamples=500)
        true = truth[found.peak_step // 5] - truth[0]
        covered += found.low <= true <= found.high
    assert 0.91 <= covered / 200 <= 0.99


def test_problems_are_resampled_in_pairs_so_what_they_share_does_not_widen_the_interval():
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(0, 0.9, size=500)
    measure = ProblemAccuracy(np.array([0, 5]), np.stack([difficulty, difficulty + 0.05]))
    found = peak_statistics(measure, measure)
    assert found.high - found.low < 1e-9
    assert found.low == pytest.approx(0.05)


def test_the_interval_agrees_with_the_normal_one_where_that_holds_and_with_itself_for_a_seed():
    values = np.random.default_rng(1).normal(0.1, 0.3, size=1024)
    low, high = bootstrap_mean_interval(values, seed=0)
    error = values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert (low, high) == bootstrap_mean_interval(values, seed=0)
    assert (low, high) != bootstrap_mean_interval(values, seed=1)


def test_per_problem_results_are_read_and_the_later_line_of_a_step_counts(tmp_path):
    lines = [{"step": 5, "correct": [1, 2], "n": 4}, {"step": 0, "correct": [0, 4], "n": 4}]
    lines.append({"step": 5, "correct": [3, 3], "n": 4})
    write(tmp_path, "measure", lines)
    found = load_problem_accuracy(tmp_path, "measure")
    assert found.steps.tolist() == [0, 5]
    assert found.accuracy.tolist() == [[0.0, 1.0], [0.75, 0.75]]
    assert load_problem_accuracy(tmp_path, "select") is None


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([{"step": 0, "n": 4}], "line 1 is not"),
        ([{"step": 0, "correct": [1], "n": 0}], "line 1 is not"),
        ([{"step": 0, "correct": [1], "n": 4}, {"step": 5, "correct": [1, 2], "n": 4}], "number of problems"),
    ],
)
def test_broken_results_are_refused_with_a_sentence(tmp_path, lines, sentence):
    write(tmp_path, "measure", lines)
    with pytest.raises(RunError, match=sentence):
        load_problem_accuracy(tmp_path, "measure")


def test_the_peak_is_chosen_among_the_steps_that_both_sets_have():
    """A run that is between the evaluations of its two sets has a step of the first one only."""
    select, measure = problems([0.1, 0.6, 0.9], 50, 0), problems([0.1, 0.6], 50, 1)
    assert peak_statistics(select, measure).peak_step == 5


def test_a_measuring_set_that_lacks_the_start_is_refused():
    select, measure = problems([0.1, 0.9, 0.1], 50, 0), problems([0.1, 0.6], 50, 1)
    with pytest.raises(ValueError, match="not evaluated at step 0"):
        peak_statistics(select, ProblemAccuracy(measure.steps + 5, measure.accuracy))


def test_a_line_that_is_still_being_written_is_passed_over(tmp_path):
    write(tmp_path, "measure", [{"step": 0, "correct": [1, 2], "n": 4}])
    with (tmp_path / "evals/measure.jsonl").open("a") as file:
        file.write('{"step": 5, "correct": [1, ')
    assert load_problem_accuracy(tmp_path, "measure").steps.tolist() == [0]


def write(folder, name, lines):
    (folder / "evals").mkdir(exist_ok=True)
    (folder / "evals" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
