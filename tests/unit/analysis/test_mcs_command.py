"""`urlvr mcs --measure` on runs that are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic_runs import make_run
from typer.testing import CliRunner

from megatron_urlvr.analysis.study import plan_study
from megatron_urlvr.cli import app
from megatron_urlvr.config.errors import ConfigError
from megatron_urlvr.config.loader import load_config
from megatron_urlvr.config.mcs import McsConfig
from megatron_urlvr.exit_codes import UnusableInput

QUICKSTART = Path(__file__).parents[3] / "configs/quickstart.yaml"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tree = {
        "name": "mcs",
        "dir": str(tmp_path / "mcs"),
        "title": "Steps",
        "config": str(QUICKSTART),
        "policies": {"frail": "/models/frail", "robust": "/models/robust"},
        "settings": {"default": ["reward.terms.main.name=majority_vote"]},
        "supervised": ["reward.terms.main.name=ground_truth"],
        "threshold": 0.1,
    }
    path = tmp_path / "mcs.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> list[dict[str, Any]]:
    """Change every row of the run's metrics in place, and return them."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        change(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_steps_gains_and_concordance_are_printed_and_kept(file: Path, tmp_path: Path):
    runs = tmp_path / "mcs/runs"
    make_run(runs / "default.frail", "dies", reward="majority_vote")
    robust = make_run(runs / "default.robust", "rises", reward="majority_vote", base="strong")
    rewrite(robust, lambda row: row.pop("eval/held_out/base/greedy", None))
    make_run(runs / "supervised.frail", "truth", reward="ground_truth", seed=1)
    make_run(runs / "supervised.robust", "truth", reward="ground_truth", seed=2)
    result = CliRunner().invoke(app, ["mcs", str(file), "--measure"])
    assert result.exit_code == 0, result.exception
    assert "Model Collapse Steps, setting default, below 0.1, rule paper" in result.output
    assert "> 100.0 (1/1 not)" in result.output
    kept = json.loads((tmp_path / "mcs/mcs.json").read_text())
    assert list(kept["rules"]) == ["paper"]
    found = kept["rules"]["paper"]["settings"]["default"]
    steps = {run["policy"]: run["steps"] for run in found["runs"]}
    assert not steps["frail"]["precision"]["censored"]
    assert steps["robust"]["precision"] == {"step": 100, "censored": True, "tokens": None}
    concordance = found["concordance"]["precision"]["supervised gain"]
    assert (concordance["pairs"], concordance["policies"]) == (1, 2)
    gain = {each["policy"]: each["supervised gain"] for each in kept["gains"]}
    assert concordance["c"] == float(gain["robust"] > gain["frail"])
    assert list(concordance["base"]) == ["avg@16", "maj@16"]  # greedy was measured of one base only
    for each in concordance["base"].values():  # the base that collapses later evaluates higher
        assert (each["c"], each["difference"]) == (concordance["c"], 0.0)
    assert f"    base maj@16: {concordance['c']:.2f}" in result.output
    assert "on the same pairs, step minus base +0.00" in result.output
    assert (tmp_path / "mcs/mcs.png").read_bytes().startswith(b"\x89PNG")


def test_the_papers_rule_is_measured_beside_a_smoothed_one_and_so_are_both_sweeps(file: Path, tmp_path: Path):
    """One bad batch long before the end: the paper's rule stops there, three in a row do not."""
    folder = make_run(tmp_path / "mcs/runs/default.frail", "dies", reward="majority_vote")
    rows = rewrite(folder, lambda row: row.update({"audit/vote/precision": 0.0} if row["step"] == 3 else {}))
    result = CliRunner().invoke(app, ["mcs", str(file), "--measure", "smoothing=3", "persistence=2"])
    assert result.exit_code == 0, result.exception
    assert "rule smoothed: smoothing 3, persistence 2" in result.output
    rules = json.loads((tmp_path / "mcs/mcs.json").read_text())["rules"]
    precision = {row["step"]: row["audit/vote/precision"] for row in rows if row["step"] > 0}
    means = {step: sum(precision[step - k] for k in range(3)) / 3 for step in precision if step >= 3}
    smoothed = next(step for step in means if all(means.get(step + k, 0.0) < 0.1 for k in range(2)))
    assert smoothed > 5
    for name, (smoothing, persistence), expected in [("paper", (1, 1), 3), ("smoothed", (3, 2), smoothed)]:
        assert (rules[name]["smoothing"], rules[name]["persistence"]) == (smoothing, persistence)
        (run,) = rules[name]["settings"]["default"]["runs"]
        assert run["steps"]["precision"]["step"] == run["sweep"]["precision"]["0.1"] == expected


def test_a_policy_may_have_overrides_of_its_own(file: Path):
    own = 'policy_overrides={"frail": ["run.steps=7"]}'
    config = load_config(file, [own], McsConfig)
    steps = {run.run: run.config.run.steps for run in plan_study(config.study(), file).runs}
    assert steps["default.frail"] == steps["supervised.frail"] == 7
    assert steps["default.robust"] != 7
    with pytest.raises(
        ConfigError, match=r"policy_overrides\.firm: there is no such policy; policies are frail, robust"
    ):
        load_config(file, [own.replace("frail", "firm")], McsConfig)


def test_a_run_with_labels_has_no_collapse_step(file: Path, tmp_path: Path):
    make_run(tmp_path / "mcs/runs/default.frail", "truth", reward="ground_truth")
    result = CliRunner().invoke(app, ["mcs", str(file), "--measure"])
    assert isinstance(result.exception, UnusableInput)
    assert "trained with labels" in str(result.exception)


def test_nothing_to_measure_is_told(file: Path):
    result = CliRunner().invoke(app, ["mcs", str(file), "--measure"])
    assert isinstance(result.exception, UnusableInput)
    assert "has no runs to measure yet" in str(result.exception)


def test_a_setting_cannot_be_called_supervised(file: Path):
    result = CliRunner().invoke(app, ["mcs", str(file), "settings.supervised=[]", "--measure"])
    assert isinstance(result.exception, ConfigError)
    assert "is that of the runs with labels" in str(result.exception)
