"""The studies in configs/ can be planned as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_urlvr.analysis.study import plan_study
from megatron_urlvr.config.loader import load_config, model_of
from megatron_urlvr.config.mcs import McsConfig
from megatron_urlvr.config.study import StudyConfig

CONFIGS = Path(__file__).parents[3] / "configs"
STUDIES = sorted((CONFIGS / "studies").glob("*.yaml"))
STUDIES = [path for path in STUDIES if "bases:" in path.read_text() or "grid:" in path.read_text()]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_loads_with_its_configs(path: Path):
    """The last value of every axis with each of the others' first: every base, and most overrides of the ends."""
    config = load_config(path, [], model_of(path))
    study = config.study() if isinstance(config, McsConfig) else config
    assert isinstance(study, StudyConfig)
    ends = [{name: axis[name] for name in (next(iter(axis)), list(axis)[-1])} for axis in study.grid]
    for axis in ends:
        for point in axis.values():
            point.seeds = None
    few = dict(list(study.runs.items())[-2:])
    plan = plan_study(study.model_copy(update={"grid": ends, "runs": few, "seeds": [0]}), path)
    assert len({run.folder for run in plan.runs}) == len(plan.runs) > 0
    assert all(run.config.eval.sets for run in plan.runs)


def test_rise_and_fall_has_its_rewards_worlds_and_seeds():
    config = load_config(CONFIGS / "studies/rise_and_fall.yaml", [], StudyConfig)
    worlds: dict[str, int] = {}
    for name, run in config.all_runs().items():
        world = name.partition(".")[0]
        worlds[world] = worlds.get(world, 0) + len(run.seeds or config.seeds)
    assert worlds == {"planted": 45, "clean": 27, "planted_biased": 27, "clean_biased": 27}
