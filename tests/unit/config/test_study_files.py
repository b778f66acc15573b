"""The studies in configs/ can be planned as they stand."""

from __future__ import annotations

import itertools
import operator
from pathlib import Path

import pytest
from chat_templates import sources_that_cannot_start

from megatron_urlvr.analysis.study import plan_study
from megatron_urlvr.config.checks import check
from megatron_urlvr.config.data import TaskSource
from megatron_urlvr.config.loader import load_config, model_of
from megatron_urlvr.config.mcs import McsConfig
from megatron_urlvr.config.study import StudyConfig, StudyRun
from megatron_urlvr.data.tasks import get_task
from megatron_urlvr.policy.hf.folder import read_config

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
STUDIES = sorted((CONFIGS / "studies").glob("*.yaml"))
FULL = sorted((CONFIGS / "studies/full").glob("*.yaml"))
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


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_a_full_size_study_loads_and_its_layouts_suit_its_models(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every value of every axis, one changed at a time from the first of each."""
    monkeypatch.chdir(ROOT)
    config = load_config(path, [], model_of(path))
    study = config.study() if isinstance(config, McsConfig) else config
    kept = one_at_a_time(study)
    plan = plan_study(study.model_copy(update={"grid": [], "runs": kept}), path)
    assert len({run.folder for run in plan.runs}) == len(plan.runs) >= len(kept)
    for run in plan.runs:
        parallel, model = run.config.parallel, read_config(run.config.model.path)
        ranks = int(parallel.dp) * parallel.tp * parallel.pp
        assert check(run.config, world_size=ranks, hf_config=model, tokenizer_size=None, device="cuda") == []
        assert [*sources_that_cannot_start(run.config)] == []
        assert ranks + run.config.servers.policy.count * run.config.servers.policy.tp <= 8, "one node"


def one_at_a_time(study: StudyConfig) -> dict[str, StudyRun]:
    """Runs of a grid that differ from its first in one axis at most."""
    first = [next(iter(axis)) for axis in study.grid]
    runs = study.all_runs()
    points = itertools.product(*study.grid) if study.grid else ()
    near = [".".join(point) for point in points if sum(map(operator.ne, point, first)) <= 1]
    return {key: runs[key] for key in near or runs}


@pytest.mark.parametrize("path", ["studies/train_sizes.yaml", "studies/full/train_sizes.yaml"])
def test_runs_serve_every_prompt_of_the_largest_set(path: str):
    """An axis of sizes beyond what a run serves would compare equal runs."""
    sizes = {}
    config = load_config(CONFIGS / path, [], StudyConfig)
    for run in plan_study(config.model_copy(update={"seeds": [0]}), CONFIGS / path).runs:
        source, rollout = run.config.data.train, run.config.rollout
        sizes[run.run] = source.size if isinstance(source, TaskSource) else source.limit
        assert sizes[run.run] <= run.config.run.steps * rollout.prompts
    assert sorted(set(sizes.values())) == [32, 128, 512, 2048, 8192, 16384]


def test_a_single_problem_is_also_what_is_evaluated():
    path = CONFIGS / "studies/single_problems.yaml"
    study = load_config(path, [], StudyConfig)
    runs = {key: run for key, run in study.all_runs().items() if key.endswith(("_0", "_24"))}
    plan = plan_study(study.model_copy(update={"grid": [], "runs": runs, "seeds": [3]}), path)
    places = set()
    for run in plan.runs:
        trained, evaluated = run.config.data.train, run.config.eval.sets["trained"]
        assert isinstance(trained, TaskSource)
        assert isinstance(evaluated, TaskSource)
        assert prompts_of(trained) == prompts_of(evaluated)
        assert len(prompts_of(trained)) == 1
        assert evaluated.greedy
        places.add(trained.skip)
    assert places == {0, 24}


def prompts_of(source: TaskSource) -> list[str]:
    """Prompts of a source of the training side that has a seed of its own."""
    assert source.seed is not None
    made = get_task(source.task, source.settings).prompts(
        source.size, seed=source.seed, split=source.split or "train", skip=source.skip
    )
    return [prompt.text for prompt in made]


def test_rise_and_fall_has_its_rewards_worlds_and_seeds():
    config = load_config(CONFIGS / "studies/rise_and_fall.yaml", [], StudyConfig)
    worlds: dict[str, int] = {}
    for name, run in config.all_runs().items():
        world = name.partition(".")[0]
        worlds[world] = worlds.get(world, 0) + len(run.seeds or config.seeds)
    assert worlds == {"planted": 45, "clean": 27, "planted_biased": 27, "clean_biased": 27}
