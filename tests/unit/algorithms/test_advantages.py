"""Advantages against a computation by hand in float64."""

import math
import statistics
from importlib.metadata import EntryPoint

import pytest
import torch
from torch.testing import assert_close

from megatron_urlvr import registry
from megatron_urlvr.algorithms.advantages import (
    available,
    dr_grpo,
    get_advantage,
    grpo,
    rloo,
    standardise,
    zero_variance,
)
from megatron_urlvr.config.base import UnknownName

REWARDS = [[1.0, 0.0, 0.0, 1.0, 1.0], [-3.5, -2.0, -7.25, -0.5, -4.0], [1e-3, 2e-3, 0.0, 0.0, 5e-3]]


def by_hand(name, row):
    """One group with the standard library, in float64."""
    if name == "rloo":
        return [r - statistics.fmean(row[:i] + row[i + 1 :]) for i, r in enumerate(row)]
    centred = [r - statistics.fmean(row) for r in row]
    return centred if name == "dr_grpo" else [c / (statistics.stdev(row) + 1e-6) for c in centred]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_advantages_are_those_computed_by_hand(name):
    result = get_advantage(name)(torch.tensor(REWARDS))
    assert result.dtype == torch.float32
    assert_close(result.double(), torch.tensor([by_hand(name, row) for row in REWARDS]).double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_a_group_does_not_see_the_others(name):
    rewards = torch.tensor(REWARDS)
    together = get_advantage(name)(rewards)
    for g in range(len(rewards)):
        assert torch.equal(get_advantage(name)(rewards[g : g + 1])[0], together[g])


@pytest.mark.parametrize("estimate", [grpo, dr_grpo, rloo])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -37.7])
def test_a_unanimous_group_teaches_nothing(estimate, value):
    assert_close(estimate(torch.full((1, 7), value)), torch.zeros(1, 7), rtol=0, atol=1e-15)
    assert zero_variance(torch.full((1, 7), value)).tolist() == [True]


def test_rounding_noise_is_not_blown_up_into_a_signal():
    # identical responses whose log-probs differ by the rounding of another layout
    noise = torch.tensor([[-3.2e-4, -3.2e-4 + 4e-7, -3.2e-4 - 3e-7, -3.2e-4]])
    assert grpo(noise).tolist() == [[0, 0, 0, 0]]
    assert zero_variance(noise).tolist() == [True]
    assert zero_variance(torch.tensor([[0.0, 0.0, 1e-3], [0.0, 1.0, 1.0]])).tolist() == [False, False]


@pytest.mark.parametrize("wins", range(1, 16))
def test_for_a_binary_reward_dissenters_pay_the_odds(wins):
    # z-scores are sqrt((1-p)/p) and -sqrt(p/(1-p)), times sqrt((n-1)/n) for the unbiased deviation
    n = 16
    p = wins / n
    result = grpo(torch.tensor([[1.0] * wins + [0.0] * (n - wins)])).double()
    bias = math.sqrt((n - 1) / n)
    assert_close(result[0, 0].item(), bias * math.sqrt((1 - p) / p), rtol=1e-5, atol=0)
    assert_close(result[0, -1].item(), -bias * math.sqrt(p / (1 - p)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_what_is_called_scale_free_is(name):
    advantage = get_advantage(name)
    rewards = torch.tensor(REWARDS[:2])
    same = torch.allclose(advantage(rewards), advantage(rewards * 8), rtol=1e-4, atol=1e-5)
    assert same == advantage.scale_free


def test_no_constant_added_to_a_group_changes_anything():
    rewards = torch.tensor(REWARDS).double()
    for estimate in (grpo, dr_grpo, rloo):
        assert_close(estimate(rewards + 11.931), estimate(rewards), rtol=1e-5, atol=1e-6)


def test_small_probabilities_are_told_apart_in_float64():
    rewards = torch.tensor([[1e-30, 3e-30]], dtype=torch.float64)
    assert_close(rloo(rewards), torch.tensor([[-2e-30, 2e-30]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 3, 4)])
def test_a_prompt_needs_two_samples(name, shape):
    with pytest.raises(ValueError, match=rf"{name}.*at least 2 samples.*n_train"):
        get_advantage(name)(torch.zeros(shape))


def test_one_value_standardises_to_zero():
    assert standardise(torch.tensor([[5.0]])).tolist() == [[0.0]]


def doubled(rewards):
    return 2 * rewards


def test_an_entry_point_adds_an_estimator(monkeypatch):
    point = EntryPoint(name="doubled", value=f"{__name__}:doubled", group="megatron_urlvr.advantage")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
    advantage = get_advantage("doubled")
    assert {"doubled", "dr_grpo", "grpo", "rloo"} <= set(available())
    assert advantage(torch.tensor([[1.0, 2.0]])).tolist() == [[2.0, 4.0]]
    assert not advantage.scale_free


def test_an_unknown_estimator_says_what_there_is():
    with pytest.raises(UnknownName) as error:
        get_advantage("grop")
    assert {"grpo", "dr_grpo", "rloo"} <= set(error.value.known)
