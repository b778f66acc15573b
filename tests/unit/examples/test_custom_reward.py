"""The example reward keeps the contract that its file explains."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_urlvr.config.reward import RewardSection
from megatron_urlvr.rewards import build_terms, describe, registry
from megatron_urlvr.types import Group, Prompt, Sample

EXAMPLE = Path(__file__).parents[3] / "examples" / "custom_reward.py"


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    before = dict(registry._rewards._own)
    spec = importlib.util.spec_from_file_location("custom_reward_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield
    registry._rewards._own.clear()
    registry._rewards._own.update(before)


def group(classes: list[int | None]) -> Group:
    samples = [Sample("p", i, [1], "", "stop", answer=None if c is None else str(c)) for i, c in enumerate(classes)]
    return Group(Prompt("p", "?", (1,)), samples, classes)


def test_a_registered_reward_is_named_in_a_config_with_its_own_options() -> None:
    section = RewardSection.model_validate({"terms": {"main": {"name": "vote_margin", "sharpness": 2.0}}})
    combined = build_terms(section, advantage="grpo", seed=0)
    # 3 votes to 1 of 5: margin 2/5, squared.
    result = combined.score(group([0, 0, 2, 0, None]))
    torch.testing.assert_close(result.total, torch.tensor([0.16, 0.16, -0.16, 0.16, 0.0], dtype=torch.float64))


def test_a_split_vote_and_a_group_without_answers_teach_nothing() -> None:
    section = RewardSection.model_validate({"terms": {"main": {"name": "vote_margin"}}})
    combined = build_terms(section, advantage="grpo", seed=0)
    assert combined.score(group([0, 1, 0, 1])).total.tolist() == [0.0] * 4
    assert combined.score(group([None, None])).total.tolist() == [0.0] * 2


def test_the_command_that_lists_rewards_shows_it() -> None:
    found = next(info for info in describe() if info.name == "vote_margin")
    assert "winning class" in found.formula
    assert [option.name for option in found.options] == ["sharpness"]
