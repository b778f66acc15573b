"""The learning-rate schedule, written out."""

import math

import pytest

from megatron_urlvr.config.optim import OptimSection
from megatron_urlvr.policy.optimizer import learning_rate


def rates(total: int, **fields) -> list[float]:
    return [learning_rate(OptimSection(**fields), update, steps=total) for update in range(total)]


def test_constant_stays():
    assert rates(4, lr=0.5) == [0.5] * 4


def test_warm_up_climbs_from_nothing_to_the_peak_in_equal_steps():
    assert rates(6, lr=0.4, warmup_steps=4) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_linear_reaches_the_floor_after_the_last_step():
    assert rates(4, lr=1.0, schedule="linear", min_lr=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert learning_rate(OptimSection(lr=1.0, schedule="linear", min_lr=0.2), 4, steps=4) == pytest.approx(0.2)


def test_cosine_is_half_a_wave_down_to_the_floor():
    found = rates(8, lr=1.0, schedule="cosine", min_lr=0.1)
    assert found == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)])
    assert found[4] == pytest.approx(0.55)
    assert learning_rate(OptimSection(lr=1.0, schedule="cosine", min_lr=0.1), 8, steps=8) == pytest.approx(0.1)


def test_the_schedule_follows_the_warm_up():
    assert rates(6, lr=1.0, schedule="linear", warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_longer_than_the_run_and_a_run_of_one_step_are_harmless(schedule: str):
    assert rates(2, lr=1.0, schedule=schedule, warmup_steps=4) == pytest.approx([0.25, 0.5])
    assert rates(1, lr=1.0, schedule=schedule) == [1.0]
    floor = 0.0 if schedule == "constant" else 0.3
    assert learning_rate(OptimSection(lr=1.0, schedule=schedule, min_lr=floor), 99, steps=10) >= 0.3


def test_a_horizon_of_its_own_leaves_the_rates_of_a_longer_run_as_they_were_and_then_stays_at_the_floor():
    section = OptimSection(lr=1.0, schedule="linear", min_lr=0.2, schedule_steps=2)
    found = [learning_rate(section, update, steps=4, per_step=2) for update in range(8)]
    assert found == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2])
    section.schedule_steps = None
    assert [learning_rate(section, update, steps=2, per_step=2) for update in range(4)] == found[:4]
