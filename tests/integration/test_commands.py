"""What the other commands say of a run that training left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from small_runs import Command, rows

TABLE_1 = ["self_certainty", "token_entropy", "trajectory_entropy", "probability", "probability_disparity"]
"""The certainty rewards of the URLVR study."""


def measured(run: Path, name: str) -> dict[str, float]:
    return json.loads((run / "evals" / f"eval_{name}.json").read_text())["sets"]["held_out"]


def test_eval_gives_the_figures_that_the_run_gave(urlvr: Command, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert urlvr("train", config, "eval.every=4", "run.steps=4").code == 0
    first, *_, last = rows(run)
    for name, row, arguments in (("base", first, []), ("step_000004", last, ["--checkpoint", "step_000004"])):
        outcome = urlvr("eval", run, *arguments)
        assert outcome.code == 0
        found = measured(run, name)
        logged = {key.removeprefix("eval/held_out/"): value for key, value in row.items() if key.startswith("eval/")}
        assert found == {key: value for key, value in logged.items() if not key.startswith("base/")}
        for key in ("avg@2", "maj@2", "greedy", "parse_rate"):
            assert re.search(rf"^ *held_out  {key} +{found[key]:.4f}$", outcome.out, re.MULTILINE)
    assert measured(run, "base") != measured(run, "step_000004")
    assert rows(run)[-1] == last


def test_eval_takes_other_sets_and_other_samples(urlvr, config, tmp_path):
    other = 'eval.sets.other={"task": "chain_sum", "size": 4, "samples": 3, "greedy": false, "settings": {"digits": 3}}'
    outcome = urlvr("eval", config, other, "--set", "other", "eval.sets.other.pass_k=[2]")
    assert outcome.code == 0
    found = json.loads((tmp_path / "run/evals/eval_base.json").read_text())["sets"]
    assert found.keys() == {"other"}
    assert {"avg@3", "maj@3", "pass@2"} <= found["other"].keys()
    assert "greedy" not in found["other"]


def test_eval_says_how_rewards_go_with_correctness_and_keeps_every_problem(urlvr, config, tmp_path):
    sampled = ("eval.sets.held_out.samples=6", "eval.sets.held_out.maj_k=[3]")
    before = [
        f"reward.terms.before.{key}" for key in ("name=token_entropy", "aggregation=mean", "span=reasoning", "empty=0")
    ]
    names = [*TABLE_1, "semantic_entropy", "before"]
    outcome = urlvr("eval", config, *sampled, *before, *(word for name in names for word in ("--reward", name)))
    assert outcome.code == 0
    found = measured(tmp_path / "run", "base")
    assert "maj@3" in found
    both = [f"{name}_{way}" for name in TABLE_1[:3] for way in ("mean", "sum")]
    for label in [*both, *TABLE_1[3:], "semantic_entropy", "before"]:
        assert 0 <= found[f"{label}/auroc"] <= 1
        assert 0 <= found[f"{label}/aligned"] <= 1
    calibrated = {key.removesuffix("/ece") for key in found if key.endswith("/ece")}
    assert calibrated == {"probability", "probability_disparity", "semantic_entropy"}
    assert all(0 <= found[f"{label}/ece"] <= 1 for label in calibrated)
    assert found["probability/underflow"] == 0
    assert 0 <= found["probability_disparity/no_answer"] <= 1
    table = tmp_path / "run/evals/eval_base.held_out.problems.jsonl"
    problems = [json.loads(line) for line in table.read_text().splitlines()]
    assert len(problems) == 8
    assert sum(each["correct"] for each in problems) / 48 == pytest.approx(found["avg@6"])
    compared = urlvr("compare", table, table)
    assert compared.code == 0
    assert "[+0.0000, +0.0000]" in compared.out


def test_eval_refuses_rewards_that_it_cannot_compute(urlvr, config):
    refused = {
        "ground_truth": "it reads labels",
        "majority": "Did you mean majority_vote?",
        "program": "it needs the signal 'check', which evaluation does not compute",
        "length": "its option 'target' must be given: make it a term, reward.terms.LABEL",
    }
    for name, words in refused.items():
        outcome = urlvr("eval", config, "--reward", name)
        assert outcome.code == 2
        assert words in outcome.err


def test_eval_of_a_damaged_checkpoint_is_unusable_input(urlvr, config, tmp_path):
    assert urlvr("train", config, "run.steps=2", "eval.every=0").code == 0
    (tmp_path / "run/checkpoints/step_000002/__0_0.distcp").write_bytes(b"")
    outcome = urlvr("eval", config, "eval.every=0", "--checkpoint", "step_000002")
    assert outcome.code == 2
    assert "__0_0.distcp holds 0 bytes of" in outcome.err


def test_samples_are_those_of_the_probes_with_their_rewards(urlvr, whole):
    outcome = urlvr("samples", whole, "--step", "3", "--sort", "-reward")
    assert outcome.code == 0
    assert outcome.out.startswith("step 3, probes: 8 of 8 samples\n")
    rewards = [float(value) for value in re.findall(r"reward (\S+)", outcome.out)]
    kept = [json.loads(line) for line in (whole / "samples/step_000003.jsonl").read_text().splitlines()]
    assert rewards == pytest.approx(sorted((row["reward"] for row in kept), reverse=True), rel=1e-3)
    assert urlvr("samples", whole).out.startswith("step 6, probes")


def test_samples_of_recorded_rollouts_have_rewards_too(urlvr, config, tmp_path):
    assert urlvr("train", config, "run.steps=1", "eval.every=0", "rollout.record=true").code == 0
    outcome = urlvr("samples", tmp_path / "run")
    assert outcome.out.startswith("step 1, rollouts: 16 of 16 samples\n")
    rewards = [float(value) for value in re.findall(r"reward (\S+)", outcome.out)]
    assert sum(rewards) / 16 == pytest.approx(rows(tmp_path / "run")[1]["reward/proxy"], rel=1e-3)


def test_runs_lists_the_run_with_its_figures(urlvr, whole):
    outcome = urlvr("runs", whole.parent)
    assert outcome.code == 0
    line = next(line for line in outcome.out.splitlines() if "trajectory_entropy" in line)
    start = rows(whole)[0]["eval/held_out/avg@2"]
    assert re.search(rf"run +trajectory_entropy \(sum\) +1 +6/6 +held_out +{start:.3f} ", line)
    assert line.rstrip().endswith("done")


def test_report_is_one_page_that_holds_everything(urlvr, whole, tmp_path):
    outcome = urlvr("report", whole, "--out", tmp_path / "report")
    assert outcome.code == 0
    page = Path(outcome.out.strip())
    text = page.read_text()
    assert "data:image/png;base64," in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    for mention in ("trajectory_entropy (sum)", "held_out", "evaluation:held_out", "audit", "probes"):
        assert mention in text


def test_the_folder_of_a_run_is_its_config(urlvr, config, whole, tmp_path):
    assert urlvr("config", "show", whole).out == (whole / "config.yaml").read_text()
    assert f"{whole} is done: 6 steps" in urlvr("train", whole).out
    provenance = json.loads((whole / "provenance.json").read_text())
    assert provenance["hashes"].keys() == {"data/train", "data/held_out", "model"}
