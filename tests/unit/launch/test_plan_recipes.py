"""Every recipe is a valid config whose plan, asked for as its first lines say, finds a layout that works and fits."""

import re
import shlex
from pathlib import Path

import pytest
from chat_templates import HAS_CHAT_TEMPLATE, sources_that_cannot_start

from megatron_urlvr.config.loader import load_config, to_yaml
from megatron_urlvr.launch.plan.crew import crew_of
from megatron_urlvr.launch.plan.hardware import GPUS, assume
from megatron_urlvr.launch.plan.plan import Plan, load_model, make_plan

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "configs" / "recipes"
RECIPES = sorted(
    str(path.relative_to(ROOT))
    for path in FOLDER.rglob("*.yaml")
    if path.name != "base.yaml" and path.parent.name != "published"
)
SAMPLED = ["configs/recipes/paper/majority_vote.yaml", "configs/recipes/qwen2.5-72b_16nodes.yaml"]


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def options(recipe: str) -> dict[str, str]:
    """What the recipe's own comment says to plan it with."""
    found = re.search(r"^#\s+urlvr plan (\S+)(.*)$", Path(recipe).read_text(), re.MULTILINE)
    assert found, f"{recipe} does not say how to plan it"
    assert found[1] == recipe
    words = shlex.split(found[2])
    return dict(zip(words[::2], words[1::2], strict=True))


def planned(recipe: str, *, built: bool) -> Plan:
    asked = options(recipe)
    config = load_config(recipe)
    crew = crew_of(config, int(asked["--gpus"]), None)
    gpu = GPUS[asked.get("--gpu", "H100-80GB")]
    return make_plan(config, load_model(config), gpu, crew, assume([]), built=built)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_shows_itself_completely_and_fits_the_gpus_it_names(recipe: str, tmp_path: Path):
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(load_config(recipe)))
    assert load_config(resolved) == load_config(recipe)
    plan = planned(recipe, built=False)
    assert plan.problems == []
    assert plan.crew.gpus == int(options(recipe)["--gpus"])
    assert plan.config.run.dir == f"runs/{plan.config.run.name}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_asks_for_a_chat_template_where_its_model_has_one(recipe: str):
    assert [*sources_that_cannot_start(load_config(recipe))] == []


def test_every_model_says_whether_it_has_a_chat_template():
    assert {path.parent.name for path in FOLDER.glob("models/*/config.json")} == set(HAS_CHAT_TEMPLATE)


@pytest.mark.parametrize("recipe", SAMPLED)
def test_the_shards_of_a_recipe_fit_when_they_are_built(recipe: str):
    built, estimated = planned(recipe, built=True), planned(recipe, built=False)
    assert built.problems == []
    for one, other in zip(built.ranks, estimated.ranks, strict=True):
        assert one.peak == pytest.approx(other.peak, rel=0.01)


def test_recipes_are_in_the_table_of_the_documentation():
    text = Path("docs/recipes.md").read_text()
    missing = [recipe for recipe in RECIPES if Path(recipe).stem not in text]
    assert missing == []
