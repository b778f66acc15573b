"""Reading run folders, and verdicts: what the words for a curve mean."""

import json

import numpy as np
import pytest
import yaml
from synthetic_runs import make_run

from megatron_urlvr.analysis.curves import Curve, ends, mean_curve, summarize
from megatron_urlvr.analysis.runs import RunError, Series, differing_settings, load_run, reward_text, tell_bases_apart


def curve(*values, every=5):
    return Curve(np.arange(len(values)) * every, np.asarray(values, dtype=float))


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.27, 0.60, 0.97], "rose and held"),
        ([0.27, 0.97, 0.95], "rose and held"),
        ([0.27, 0.41, 0.00], "rose and collapsed"),
        ([0.27, 0.26, 0.01], "collapsed"),
        ([0.27, 0.41, 0.12], "rose and fell below its start"),
        ([0.27, 0.41, 0.28], "rose and fell back to its start"),
        ([0.27, 0.61, 0.45], "rose and fell part of the way"),
        ([0.27, 0.26, 0.15], "fell"),
        ([0.27, 0.29, 0.26], "flat"),
        ([0.02, 0.03, 0.01], "flat"),
        ([0.27], "one evaluation"),
    ],
)
def test_a_verdict_says_in_words_what_the_curve_did(values, verdict):
    assert summarize(curve(*values)).verdict == verdict


def test_a_change_within_three_standard_errors_is_not_called_one():
    values = curve(0.27, 0.33, 0.27)
    assert summarize(values, np.full(3, 0.005)).verdict == "rose and fell back to its start"
    assert summarize(values, np.full(3, 0.025)).verdict == "flat"


def test_the_peak_is_the_earliest_of_equals_and_start_and_end_are_the_first_and_last_evaluation():
    found = summarize(curve(0.1, 0.5, 0.5, 0.4))
    assert (found.start, found.peak, found.peak_step, found.end, found.end_step) == (0.1, 0.5, 5, 0.4, 15)


def test_an_empty_curve_has_no_summary():
    with pytest.raises(ValueError, match="no start"):
        summarize(curve())


def test_ends_are_means_over_five_steps_so_that_one_batch_does_not_decide():
    assert ends(curve(0, 0, 0, 0, 10, 1, 1, 1, 1, 1)) == (2.0, 1.0)


def test_replicates_are_averaged_over_the_steps_that_all_of_them_reached():
    mean = mean_curve([curve(1, 2, 3), curve(3, 4)])
    assert mean.steps.tolist() == [0, 5]
    assert mean.values.tolist() == [2.0, 3.0]


def test_a_run_folder_gives_its_curves_summary_and_base_lines(tmp_path):
    run = load_run(make_run(tmp_path / "weak", "dies"))
    accuracy, errors = run.accuracy("held_out")
    assert accuracy.steps.tolist() == list(range(0, 101, 5))
    assert len(errors) == 21
    assert run.summary("held_out").verdict == "rose and collapsed"
    assert run.base_lines("held_out") == {"greedy": 0.99, "maj@16": 0.69, "avg@16": 0.27}
    assert (run.name, run.base, run.state, run.supervised) == ("weak", "weak", "done", False)
    start, end = run.ends_of("reward/proxy")
    assert end > start
    assert run.sample_steps[:2] == [0, 5]
    assert run.samples(0)[0]["prompt"] == "123450="


def test_undefined_values_and_steps_that_lack_a_metric_are_left_out_of_its_curve(tmp_path):
    run = load_run(write(tmp_path, [{"step": 0, "x": None}, {"step": 1, "x": 0.5}, {"step": 2}]))
    assert run.curve("x").steps.tolist() == [1]
    assert run.metrics == ["x"]


def test_values_that_are_not_finite_are_undefined(tmp_path):
    rows = [{"step": 0, "x": float("nan")}, {"step": 1, "x": 0.5}, {"step": 2, "x": float("-inf")}]
    run = load_run(write(tmp_path, [*rows, {"step": 3, "x": 10**400, "y": float("nan")}]))
    assert run.curve("x").values.tolist() == [0.5]
    assert run.metrics == ["x"]
    assert run.first("y") is None


def test_of_a_step_written_twice_the_later_line_counts(tmp_path):
    run = load_run(write(tmp_path, [{"step": 0, "x": 1.0}, {"step": 1, "x": 2.0}, {"step": 1, "x": 3.0}]))
    assert run.curve("x").values.tolist() == [1.0, 3.0]


def test_a_line_still_being_written_is_passed_over_but_a_broken_one_inside_is_refused(tmp_path):
    folder = write(tmp_path, [{"step": 0, "x": 1.0}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "x"')
    assert load_run(folder).curve("x").values.tolist() == [1.0]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2"):
        load_run(folder)


def test_a_folder_that_is_no_run_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(RunError, match=r"is no run folder: it has no config\.yaml"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("snapshots: {}\n")
    with pytest.raises(RunError, match=r"it has no run\.name"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"eval": None}, "eval = None is no section"),
        ({"eval": {"sets": [1]}}, r"eval\.sets = \[1\] is no section"),
        ({"model": "bases/weak"}, "model = 'bases/weak' is no section"),
        ({"reward": {"terms": {"main": "majority_vote"}}}, r"reward\.terms\.main = 'majority_vote' is no term"),
        ({"reward": {"terms": {"main": {"name": "rent", "weight": None}}}}, r"reward\.terms\.main = .* is no term"),
    ],
)
def test_a_config_of_another_shape_than_a_runs_is_refused_with_a_sentence(tmp_path, changed, sentence):
    folder = make_run(tmp_path / "run")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, **changed}))
    with pytest.raises(RunError, match=sentence):
        load_run(folder)


@pytest.mark.parametrize("uses", [None, ["audit"], {"audit": None}])
def test_a_record_of_label_use_that_counts_none_is_refused_with_a_sentence(tmp_path, uses):
    folder = make_run(tmp_path / "run")
    (folder / "labels.json").write_text(json.dumps({"supervised": False, "uses": uses}))
    with pytest.raises(RunError, match=r"labels\.json: uses = .* counts no uses of labels"):
        load_run(folder)


def test_an_unfinished_run_says_how_far_it_came_and_why_it_ended(tmp_path):
    folder = write(tmp_path, [])
    (folder / "status.json").write_text(json.dumps({"state": "failed", "step": 3, "reason": "the loss was NaN"}))
    assert load_run(folder).state == "failed at step 3 of 7: the loss was NaN"


@pytest.mark.parametrize(
    ("terms", "text"),
    [
        ({"main": {"name": "trajectory_entropy", "aggregation": "sum"}}, "trajectory_entropy (sum)"),
        ({"a": {"name": "majority_vote"}, "b": {"name": "length", "weight": -0.5}}, "majority_vote + -0.5 length"),
        ({"main": {"name": "majority_vote", "aggregation": None}}, "majority_vote"),
    ],
)
def test_a_reward_is_named_with_its_weight_and_how_it_aggregates(terms, text):
    assert reward_text({"reward": {"terms": terms}}) == text


def test_settings_that_differ_are_listed_by_key_and_settings_that_one_run_lacks_are_none(tmp_path):
    first, second = make_run(tmp_path / "a", lr=1e-4), make_run(tmp_path / "b", reward="ground_truth")
    found = differing_settings([load_run(first), load_run(second)])
    assert found == {
        "optim.lr": [1e-4, 2.5e-4],
        "reward.terms.main.name": ["trajectory_entropy", "ground_truth"],
        "reward.terms.main.aggregation": ["sum", None],
    }


def test_bases_of_one_name_in_different_folders_are_told_apart(tmp_path):
    first, second = load_run(make_run(tmp_path / "a")), load_run(make_run(tmp_path / "b"))
    second.config["model"]["path"] = "bases/chain_sum/ffff0000/weak"
    series = [Series("a", [first]), Series("b", [second])]
    tell_bases_apart(series)
    assert [item.base for item in series] == ["0123abcd/weak", "ffff0000/weak"]


def write(folder, rows):
    (folder / "config.yaml").write_text("run: {name: tiny, steps: 7}\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
