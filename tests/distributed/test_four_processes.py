"""Four processes, in the layouts that take two kinds of parallelism at once, against one, on replayed rollouts.

Tolerances are those of two processes.
"""

import math

import pytest
import torch
from checkpoint_cases import CHAIN_OF_FOUR
from layout_cases import DIRECT, Case, Observed, Seen
from safetensors.torch import load_file
from test_layouts import (
    ADVANTAGE,
    REWARD,
    STATISTIC,
    assert_close_gradients,
    assert_same_bits,
    assert_same_training,
    close,
    of_any_layout,
)

pytestmark = pytest.mark.timeout(600)  # the first test waits for the processes


@pytest.fixture(params=["untied", "tied"])
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


@pytest.fixture
def one(case: Case, alone: dict[str, Seen]) -> Observed:
    return alone[case.name].ranks[0]


@pytest.fixture
def all_four(case: Case, seen_by_four: dict[str, list[Observed]]) -> list[Observed]:
    return seen_by_four[case.name]


def test_every_prompt_is_one_replicas_whose_ranks_agree_to_the_bit(one: Observed, all_four: list[Observed]):
    leaders = {seen.replica: seen for seen in reversed(all_four)}
    prompts = [prompt for seen in leaders.values() for prompt in seen.stats]
    assert sorted(prompts) == sorted(one.stats)
    for seen in all_four:
        leader = leaders[seen.replica]
        for field in ("stats", "reference_stats", "rewards", "advantages"):
            assert_same_bits(getattr(seen, field), getattr(leader, field))
        assert seen.metrics == all_four[0].metrics
        for mine, first in zip(seen.gradients, all_four[0].gradients, strict=True):
            assert_same_bits(mine, first)
        assert_same_bits(seen.stepped, all_four[0].stepped)


def test_statistics_rewards_and_advantages(one: Observed, all_four: list[Observed]):
    for seen in all_four:
        for prompt, stats in seen.stats.items():
            for name, values in stats.items():
                assert (values - one.stats[prompt][name]).abs().max() < STATISTIC, name
            assert (seen.reference_stats[prompt] - one.reference_stats[prompt]).abs().max() < STATISTIC
            for name, values in seen.rewards[prompt].items():
                assert close(values, one.rewards[prompt][name], REWARD), name
            for name, values in seen.advantages[prompt].items():
                assert close(values, one.advantages[prompt][name], ADVANTAGE), name


def test_losses_metrics_and_gradients_of_each_update(case: Case, one: Observed, all_four: list[Observed]):
    names = set(load_file(case.model / "model.safetensors"))
    for seen in all_four:
        for found, expected in zip(seen.metrics, one.metrics, strict=True):
            assert of_any_layout(found) == pytest.approx(of_any_layout(expected), rel=1e-5, abs=1e-6)
            assert math.isfinite(expected["train/grad_norm"])
        for mine, reference in zip(seen.gradients, one.gradients, strict=True):
            assert set(reference) == names
            assert_close_gradients(mine, reference)
        for name in DIRECT:
            assert_close_gradients(seen.direct[name], one.direct[name])


def test_exported_weights_are_the_folders_bit_for_bit_and_a_step_moves_them(
    case: Case, one: Observed, all_four: list[Observed]
):
    held = load_file(case.model / "model.safetensors")
    for seen in all_four:
        assert_same_bits(seen.exported, held)
        for name, tensor in seen.stepped.items():
            assert not torch.equal(tensor, held[name])
            off = (tensor - one.stepped[name]).abs()
            assert float((off > 1e-4).float().mean()) < 0.01, name


def test_training_goes_on_from_a_checkpoint_of_one_layout_in_the_next(chain_of_four):
    assert_same_training([*CHAIN_OF_FOUR, "alone"], *chain_of_four)
