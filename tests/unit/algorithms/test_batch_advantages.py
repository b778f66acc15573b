"""Advantages over the whole batch, ETTRL's scaling and the control, by hand in float64 and over any spread."""

import math
import random
import statistics
from itertools import pairwise

import pytest
import torch
from replicas import Replicas
from torch.testing import assert_close

from megatron_urlvr.algorithms.advantages import entropy_scaled, get_advantage
from megatron_urlvr.config.reward import RewardSection
from megatron_urlvr.rewards import build_terms
from megatron_urlvr.types import Group, Prompt, Sample, TokenStats

rng = random.Random(2)
REWARDS = [[rng.gauss(k, 1 + k) for _ in range(4)] for k in range(6)]


def by_hand(name, rows):
    flat = [r for row in rows for r in row]
    if name == "reinforce_pp":
        centred = [[r - statistics.fmean(flat) for r in row] for row in rows]
    else:
        centred = [[r - statistics.fmean(row) for r in row] for row in rows]
    deviation = math.sqrt(sum(c * c for row in centred for c in row) / (len(flat) - 1))
    return [[c / (deviation + 1e-6) for c in row] for row in centred]


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_they_are_those_computed_by_hand(name):
    result = get_advantage(name)(torch.tensor(REWARDS, dtype=torch.float64))
    assert result.dtype == torch.float32
    assert_close(result.double(), torch.tensor(by_hand(name, REWARDS)).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
@pytest.mark.parametrize("cuts", [(0, 3, 6), (0, 1, 4, 6), (0, 0, 6)])
def test_they_do_not_depend_on_how_prompts_are_spread_over_replicas(name, cuts):
    whole = torch.tensor(REWARDS, dtype=torch.float64)
    advantage = get_advantage(name)
    shares = [whole[a:b] for a, b in pairwise(cuts)]
    parts = Replicas(len(shares)).run(lambda rank, total, gather: advantage(shares[rank], total))
    assert_close(torch.cat(parts), advantage(whole), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_a_batch_without_variance_has_no_advantage(name):
    assert get_advantage(name)(torch.full((3, 4), 0.7)).abs().max() == 0


def test_a_group_without_variance_is_moved_by_the_batchs_mean_and_not_by_its_own():
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert get_advantage("reinforce_pp")(rewards)[0].min() > 0
    assert get_advantage("reinforce_pp_baseline")(rewards)[0].abs().max() == 0


def test_terms_normalised_each_by_itself_and_then_over_the_batch_are_gdpo():
    """Two rewards of very different scale: normalised within the group, weighted, summed, normalised over the batch."""
    groups, first, second = [], [], []
    for g in range(5):
        samples = []
        for k in range(4):
            length, logp = rng.randint(1, 9), -rng.random() * 50
            first.append(-length / 1.0)
            second.append(logp)
            stats = TokenStats(logp=torch.tensor([logp] + [0.0] * (length - 1)))
            samples.append(Sample(str(g), k, [1] * length, "", "stop", stats=stats))
        groups.append(Group(Prompt(str(g), "", (1,)), samples))
    terms = {
        "short": {"name": "length", "target": 0, "sign": -1, "scale": 1, "weight": 0.3, "normalize": True},
        "sure": {"name": "trajectory_entropy", "aggregation": "sum", "weight": 2.0, "normalize": True},
    }
    combined = build_terms(RewardSection(terms=terms), advantage="reinforce_pp", seed=0)
    totals = torch.stack([result.total for result in combined.score_groups(groups)])

    def scaled(rows):
        rows = [rows[4 * g : 4 * g + 4] for g in range(5)]
        out = []
        for row in rows:
            mean, std = statistics.fmean(row), statistics.stdev(row)
            out += [0.0 if std < 1e-6 else (r - mean) / (std + 1e-6) for r in row]
        return out

    mixed = [0.3 * a + 2.0 * b for a, b in zip(scaled(first), scaled(second), strict=True)]
    expected = by_hand("reinforce_pp", [mixed[4 * g : 4 * g + 4] for g in range(5)])
    assert_close(get_advantage("reinforce_pp")(totals), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_sure_responses_weigh_more_under_entropy_scaling():
    advantages = torch.tensor([[1.0, -1.0, 0.5], [2.0, 0.0, -2.0]])
    entropies = [[0.5, 1.0, 1.5], [0.0, 0.0, 0.0]]
    scaled = entropy_scaled(advantages, torch.tensor(entropies))
    for g, row in enumerate(entropies):
        mean = statistics.fmean(row)
        for i, h in enumerate(row):
            factor = 1 + (mean - h) / mean if mean else 1.0
            assert float(scaled[g, i]) == pytest.approx(float(advantages[g, i]) * factor, rel=1e-6)


def test_the_control_moves_nothing():
    assert get_advantage("zero")(torch.tensor(REWARDS)).abs().max() == 0
