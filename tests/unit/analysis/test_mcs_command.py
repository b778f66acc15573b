"""`urlvr mcs --measure` on runs that are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from synthetic_runs import make_run
from typer.testing import CliRunner

from megatron_urlvr.cli import app
from megatron_urlvr.config.errors import ConfigError
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


def test_steps_gains_and_concordance_are_printed_and_kept(file: Path, tmp_path: Path):
    runs = tmp_path / "mcs/runs"
    make_run(runs / "default.frail", "dies", reward="majority_vote")
    make_run(runs / "default.robust", "rises", reward="majority_vote")
    make_run(runs / "supervised.frail", "truth", reward="ground_truth", seed=1)
    make_run(runs / "supervised.robust", "truth", reward="ground_truth", seed=2)
    result = CliRunner().invoke(app, ["mcs", str(file), "--measure"])
    assert result.exit_code == 0, result.exception
    assert "Model Collapse Steps, setting default, below 0.1" in result.output
    assert "> 100.0 (1/1 not)" in result.output
    kept = json.loads((tmp_path / "mcs/mcs.json").read_text())
    steps = {run["policy"]: run["steps"] for run in kept["settings"]["default"]["runs"]}
    assert not steps["frail"]["precision"]["censored"]
    assert steps["robust"]["precision"] == {"step": 100, "censored": True, "tokens": None}
    concordance = kept["settings"]["default"]["concordance"]["precision"]["supervised gain"]
    assert (concordance["pairs"], concordance["policies"]) == (1, 2)
    assert (tmp_path / "mcs/mcs.png").read_bytes().startswith(b"\x89PNG")


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
