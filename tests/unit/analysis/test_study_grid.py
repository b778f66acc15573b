"""A grid is the runs of all combinations of its axes' values."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_urlvr.analysis.study import plan_study
from megatron_urlvr.config.errors import ConfigError
from megatron_urlvr.config.loader import load_config, model_of
from megatron_urlvr.config.study import StudyConfig

ROOT = Path(__file__).parents[3]
GRID = """
name: grid
dir: out
title: A grid
bases:
  one: {config: CONFIGS/pretrain_chain_sum.yaml}
  other: {config: CONFIGS/pretrain_chain_sum.yaml, overrides: [data.settings.biased=0.4]}
grid:
  - one: {base: one/weak, seeds: [0, 1, 2], label: plain}
    other: {base: other/weak}
  - vote: {config: CONFIGS/quickstart.yaml, overrides: [reward.terms.main.name=majority_vote]}
    fast: {config: CONFIGS/quickstart.yaml, overrides: [optim.lr=1.0e-3]}
seeds: [7]
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(GRID.replace("CONFIGS", str(ROOT / "configs")))
    return path


def test_every_combination_is_run_under_the_seeds_of_its_values(study: Path):
    config = load_config(study, [], StudyConfig)
    assert model_of(study) is StudyConfig
    plan = plan_study(config, study)
    keys = [run.key for run in plan.runs]
    assert keys == [
        *(f"one.vote/seed{k}" for k in range(3)),
        *(f"one.fast/seed{k}" for k in range(3)),
        "other.vote/seed7",
        "other.fast/seed7",
    ]
    by_key = {run.key: run for run in plan.runs}
    assert by_key["one.fast/seed2"].config.optim.lr == 1e-3
    assert by_key["one.vote/seed1"].config.reward.terms["main"].name == "majority_vote"
    assert by_key["one.vote/seed1"].config.run.seed == 1
    assert "biased" in " ".join(by_key["other.vote/seed7"].base.arguments)
    assert config.all_runs()["one.vote"].label == "plain, vote"
    assert config.labels_within_base() == {key: key.split(".")[1] for key in config.all_runs()}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("grid=[]", "runs and grid are both empty"),
        ("grid=[{a: {}}]", "the combination a has no config"),
        ("grid=[{}]", "axis 0 has no values"),
        ("grid=[{a: {config: x.yaml, base: none/weak}}]", "must be <base>/<snapshot> with a base of this study"),
        ("grid=[{a: {config: x.yaml, seeds: [1, 1]}}]", "must be different numbers"),
        ("grid=[{a/b: {config: x.yaml}}]", "keys of bases and runs name folders"),
    ],
)
def test_a_grid_that_cannot_be_run_is_told(study: Path, override: str, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        load_config(study, [override], StudyConfig)
