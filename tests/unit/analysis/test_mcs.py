"""The Model Collapse Step on made-up curves, and concordance against counting pairs by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import make_run

from megatron_urlvr.analysis.curves import Curve
from megatron_urlvr.analysis.mcs import (
    CollapseStep,
    collapse_step,
    concordance,
    first_below,
    mean_step,
    pass_gain,
    supervised_gain,
    threshold_sweep,
)
from megatron_urlvr.analysis.runs import load_run


def curve(values: list[float]) -> Curve:
    return Curve(np.arange(1, len(values) + 1), np.array(values))


def test_the_papers_rule_is_the_first_step_below():
    assert first_below(curve([0.5, 0.02, 0.009, 0.5, 0.0]), 0.01) == 3
    assert first_below(curve([0.5, 0.01]), 0.01) is None  # at the threshold is not below it


@pytest.mark.parametrize("smoothing", [2, 3, 5, 6, 7, 9])
@pytest.mark.parametrize("threshold", [0.01, 0.02, 0.05, 0.1])
def test_a_mean_at_the_threshold_is_not_below_it_however_many_steps_it_is_over(smoothing, threshold):
    assert first_below(curve([0.5] * 9 + [threshold] * 20), threshold, smoothing=smoothing) is None


def test_smoothing_and_persistence_pass_over_a_single_bad_batch():
    values = [0.5, 0.0, 0.5, 0.5, 0.004, 0.003, 0.0, 0.0]
    assert first_below(curve(values), 0.01) == 2
    assert first_below(curve(values), 0.01, persistence=2) == 5
    assert first_below(curve(values), 0.01, smoothing=3) == 7
    # below to the end counts, even where fewer steps are left than should persist
    assert first_below(curve([0.5, 0.5, 0.0]), 0.01, persistence=5) == 3
    assert first_below(curve([0.0]), 0.01, smoothing=2) is None


def test_smoothed_steps_equal_a_loop_over_windows():
    rng = np.random.default_rng(0)
    for _ in range(100):
        values = rng.random(30) ** 4
        width, stay = int(rng.integers(1, 6)), int(rng.integers(1, 4))
        expected = None
        for k in range(width - 1, 30):
            ahead = range(k, min(k + stay, 30))
            if all(values[j - width + 1 : j + 1].mean() < 0.1 for j in ahead):
                expected = k + 1
                break
        assert first_below(curve(list(values)), 0.1, smoothing=width, persistence=stay) == expected


def test_a_run_is_measured_by_labels_and_without_them_and_censored(tmp_path: Path):
    dies = load_run(_with_tokens(make_run(tmp_path / "dies", "dies", reward="majority_vote")))
    rises = load_run(_with_tokens(make_run(tmp_path / "rises", "rises", reward="majority_vote")))
    found = collapse_step(dies, "precision", threshold=0.05)
    assert found is not None
    assert not found.censored
    assert found.tokens == found.step * 1000
    assert collapse_step(rises, "precision") == CollapseStep(100, True, 100_000.0)
    unlabelled = collapse_step(dies, "label_free")
    assert unlabelled is not None
    assert not unlabelled.censored
    assert unlabelled.step < found.step
    sweep = threshold_sweep(dies, [0.02, 0.5])
    assert sweep["precision"]["0.5"] < (sweep["precision"]["0.02"] or 101)
    assert supervised_gain(dies, "held_out") == pytest.approx(-0.27, abs=0.1)
    assert pass_gain(dies, "held_out") is None


@pytest.mark.parametrize("state", ["running", "failed", "preempted"])
def test_a_run_that_has_not_come_to_its_end_has_no_gain(tmp_path: Path, state: str):
    assert supervised_gain(load_run(make_run(tmp_path / "run", "truth", state=state)), "held_out") is None


def _with_tokens(folder: Path) -> Path:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["tokens/total"] = 1000.0 * row["step"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def count_pairs(steps, censored, gains, score, chosen):
    """(c of the steps, c of `score`, pairs) over the indices `chosen`, of which some may be repeated."""
    by_step, by_score, pairs = 0.0, 0.0, 0
    for i, j in itertools.permutations(chosen, 2):
        before = steps[i] < steps[j] or (steps[i] == steps[j] and censored[j])
        if before and not censored[i]:
            pairs += 1
            by_step += 1.0 if gains[i] < gains[j] else 0.5 if gains[i] == gains[j] else 0.0
            tied = gains[i] == gains[j] or score[i] == score[j]
            by_score += 0.5 if tied else float((score[i] < score[j]) == (gains[i] < gains[j]))
    return (by_step / pairs, by_score / pairs, pairs) if pairs else (None, None, 0)


def test_steps_and_the_base_are_counted_on_the_pairs_whose_order_is_known_in_the_same_draws():
    rng = np.random.default_rng(1)
    for trial in range(12):
        n, kinds, resamples = 9, 3, 60
        steps, censored = rng.integers(1, 6, n), rng.random(n) < 0.4
        gains, score = rng.integers(0, 4, n) / 4, rng.integers(0, 4, n) / 4
        clusters = [*range(kinds), *rng.integers(kinds, size=n - kinds)]
        found = concordance(steps, censored, gains, clusters, {"greedy": score}, seed=trial, resamples=resamples)
        base = found.base["greedy"]
        assert (found.c, base.c, found.pairs) == pytest.approx(count_pairs(steps, censored, gains, score, range(n)))
        draws = []
        again = np.random.default_rng(trial)
        for _ in range(resamples):
            taken = again.integers(kinds, size=kinds)
            chosen = [i for k in taken for i in range(n) if clusters[i] == k]
            by_step, by_score, pairs = count_pairs(steps, censored, gains, score, chosen)
            if pairs:
                draws.append((by_step, by_score, by_step - by_score))
        ends = np.quantile(draws, [0.025, 0.975], axis=0).T if draws else np.full((3, 2), None)  # one trial has none
        assert base.difference == (pytest.approx(found.c - base.c) if found.pairs else None)
        told = [found.low, found.high, base.low, base.high, base.difference_low, base.difference_high]
        assert told == pytest.approx(ends.ravel().tolist())


def test_the_published_steps_rank_the_published_gains():
    """Model Collapse Steps and supervised gains on AIME24 as summarised from the paper's figure 11 (one tie)."""
    steps = [34, 40, 160, 221, 245, 280, 383]
    gains = [0.42, 1.01, 3.96, 3.96, 6.67, 7.08, 17.08]
    found = concordance(steps, [False] * 7, gains, range(7))
    assert (found.pairs, found.policies, found.clusters) == (21, 7, 7)
    assert found.c == pytest.approx(20.5 / 21)
    assert found.low is not None
    assert found.low <= found.c


def test_policies_of_one_pretraining_run_are_resampled_together():
    """Ten copies of two clusters say no more than two policies: the interval stays as wide."""
    alone = concordance([10, 20], [False, False], [0.1, 0.2], ["a", "b"])
    copies = concordance([10] * 5 + [20] * 5, [False] * 10, [0.1] * 5 + [0.2] * 5, ["a"] * 5 + ["b"] * 5)
    assert (alone.c, copies.c) == (1.0, 1.0)
    assert copies.clusters == 2
    one = concordance([10, 20], [False, False], [0.1, 0.2], ["a", "a"])
    assert (one.low, one.high) == (None, None)  # one cluster has no spread
    nothing = concordance([10, 20], [True, True], [0.1, 0.2], ["a", "b"], {"greedy": [0.1, 0.2]})
    assert (nothing.c, nothing.pairs) == (None, 0)
    assert set(vars(nothing.base["greedy"]).values()) == {None}


def test_a_mean_over_seeds_says_how_many_did_not_get_there():
    assert mean_step([CollapseStep(10, False, 1.0), CollapseStep(100, True, 1.0)]) == (55.0, 1)
