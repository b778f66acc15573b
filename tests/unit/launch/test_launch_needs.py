"""Ranks and servers: what a launch gives is what the config needs, or it is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_nemo
import pytest
from typer.testing import CliRunner

from megatron_urlvr.cli import app
from megatron_urlvr.config.loader import load_config
from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.launch.needs import Needs, needs_of, ranks_per_node

ROOT = Path(__file__).parents[3]
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for path in [*(ROOT / "configs/recipes").rglob("*.yaml"), *(ROOT / "configs").glob("quickstart*.yaml")]
    if path.name != "base.yaml"
)
VOTE = "configs/recipes/paper/majority_vote.yaml"


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def nemo(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_nemo.install(monkeypatch)


@pytest.mark.parametrize("path", CONFIGS)
def test_needs_are_those_of_the_whole_config(path: str):
    """What is read plainly, against the validated config."""
    config = load_config(path)
    parallel, found = config.parallel, needs_of(path)
    assert found.replica == parallel.tp * parallel.pp * parallel.cp
    assert found.ranks == (None if parallel.dp == "auto" else parallel.dp * found.replica)
    assert found.servers == (config.rollout.engine == "sglang" and not config.servers.policy.urls)


def test_overrides_count_and_what_cannot_be_read_is_a_sentence(tmp_path: Path):
    assert needs_of(VOTE, ["parallel.dp=2", "parallel.tp=2", "rollout.engine=embedded"]) == Needs(4, 2, servers=False)
    assert not needs_of(VOTE, ["servers.pools.policy.urls=[http://a:1]"]).servers
    with pytest.raises(UnusableInput, match=r"absent\.yaml cannot be read as a config"):
        needs_of(tmp_path / "absent.yaml")
    with pytest.raises(UnusableInput, match="cannot be read as a config"):
        needs_of(VOTE, ["parallel.dp=two"])


def test_they_are_read_where_there_is_no_torch():
    hidden = "import sys; sys.modules.update(torch=None, transformers=None, numpy=None); "
    code = f"from megatron_urlvr.launch.needs import needs_of; print(needs_of({VOTE!r}).ranks)"
    done = subprocess.run([sys.executable, "-c", hidden + code], capture_output=True, text=True, check=True)
    assert done.stdout == "4\n"


def test_a_layout_is_spread_over_nodes_or_refused():
    assert ranks_per_node(Needs(64, 32, servers=True), nodes=8, gpus=8) == 8
    assert ranks_per_node(Needs(None, 1, servers=False), nodes=2, gpus=0) == 1
    with pytest.raises(UnusableInput, match="is 64 ranks, which 4 nodes of 8 GPUs cannot share evenly"):
        ranks_per_node(Needs(64, 32, servers=True), nodes=4, gpus=8)


def test_nemo_run_knows_recipes_by_name_and_their_configs_exist(nemo: Any):
    configs = [config for config, _ in nemo.RECIPES.values()]
    assert [config for config in configs if not Path(config).exists()] == []
    papers = {f"configs/recipes/paper/{path.name}" for path in Path("configs/recipes/paper").glob("*.yaml")}
    assert papers - {"configs/recipes/paper/base.yaml"} <= set(configs)


def test_a_recipe_without_its_servers_is_not_launched(nemo: Any):
    for executor in (nemo.local(), nemo.slurm(account="me")):
        with pytest.raises(UnusableInput, match=r"takes rollouts from SGLang servers .* would start none"):
            nemo.experiment(nemo.Recipe(VOTE), nemo.build(executor))


def test_ranks_are_those_of_the_recipe(nemo: Any):
    def given(recipe: str, nodes: int, *overrides: str) -> tuple[int, int]:
        trainer, servers = (nemo.build(nemo.slurm(account="me", nodes=nodes)) for _ in range(2))
        made = nemo.experiment(nemo.Recipe(recipe, list(overrides)), trainer, servers)
        ((tasks, executors),) = made.added
        assert [task.inline.split()[1:3] for task in tasks] == [["urlvr", "train"], ["urlvr", "rollout"]]
        assert executors == [trainer, servers]
        return trainer.ntasks_per_node, servers.ntasks_per_node

    assert given(VOTE, 1) == (4, 1)
    assert given(VOTE, 2) == (2, 1)
    assert given("configs/recipes/qwen2.5-72b_16nodes.yaml", 8) == (8, 1)
    assert given("configs/quickstart_sglang.yaml", 1, "parallel.dp=auto") == (8, 1)  # one a GPU


def test_a_batch_script_has_the_ranks_of_the_layout():
    shown = CliRunner().invoke(app, ["launch", "slurm", VOTE, "--dry-run"])
    assert "#SBATCH --nodes=1 --ntasks-per-node=4 --gpus-per-node=8" in shown.output
    refused = CliRunner().invoke(app, ["launch", "slurm", VOTE, "--nodes", "3", "--dry-run"])
    assert "is 4 ranks, which 3 nodes of 8 GPUs cannot share evenly" in str(refused.exception)


@pytest.mark.parametrize(
    ("recipe", "ranks", "sentence"),
    [
        ("configs/recipes/ttrl.yaml", 8, r"takes 4 ranks, and 1 x 8 = 8 would be started"),
        ("configs/recipes/ttrl.yaml", 2, r"takes 4 ranks, and 1 x 2 = 2 would be started"),
    ],
)
def test_another_number_of_ranks_is_refused(nemo: Any, recipe: str, ranks: int, sentence: str):
    trainer, servers = nemo.build(nemo.slurm(ranks=ranks)), nemo.build(nemo.slurm())
    with pytest.raises(UnusableInput, match=sentence):
        nemo.experiment(nemo.Recipe(recipe), trainer, servers)


def test_on_one_machine_several_ranks_are_torchruns(nemo: Any):
    own = ["rollout.engine=embedded"]
    for overrides, ranks, launcher in [([], 1, None), (["parallel.dp=2"], 2, "torchrun")]:
        executor = nemo.build(nemo.local())
        nemo.experiment(nemo.Recipe("configs/quickstart.yaml", own + overrides), executor)
        assert (executor.ntasks_per_node, executor.launcher) == (ranks, launcher)
    with pytest.raises(UnusableInput, match="takes a multiple of 2 ranks, and 1 x 3 = 3"):
        nemo.experiment(nemo.Recipe("configs/quickstart.yaml", ["parallel.tp=2"]), nemo.build(nemo.local(ranks=3)))
