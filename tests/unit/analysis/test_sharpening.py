"""Tabular sharpening against closed forms (1e-12), brute force, and counting within Monte-Carlo error."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_urlvr.analysis.sharpening import (
    first_step_mass,
    fixed_reference_limit,
    grpo_advantages,
    iterate,
    limit_policy,
    majority_mass,
    objective,
    partial_contraction,
    policy,
    regularised_optimum,
    sampled_vote_paths,
    vote_reward,
    winner_probabilities,
)

BETAS = [0.1, 0.5, 1.0, 2.0, 5.0]


def random_policies(count: int = 30) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [policy(rng.gamma(0.7, size=int(rng.integers(2, 12))) + 1e-6) for _ in range(count)]


@pytest.mark.parametrize("beta", BETAS)
def test_the_tilted_reference_is_the_best_policy(beta):
    rng = np.random.default_rng(1)
    for reference in random_policies(10):
        reward = rng.normal(size=len(reference))
        best = regularised_optimum(reference, reward, beta)
        top = objective(best, reference, reward, beta)
        log_z = math.log(float(reference @ np.exp(reward / beta)))
        assert top == pytest.approx(beta * log_z, rel=1e-12, abs=1e-12)
        for _ in range(20):  # no other policy does better
            other = policy(best * np.exp(rng.normal(scale=0.3, size=len(best))))
            assert objective(other, reference, reward, beta) <= top + 1e-12


@pytest.mark.parametrize("beta", BETAS)
def test_a_moving_reference_multiplies_the_odds_and_goes_to_one(beta):
    for start in random_policies():
        mode = int(np.argmax(start))
        path = iterate(start, beta=beta, steps=40)
        np.testing.assert_allclose(path[:, mode], majority_mass(start[mode], beta, np.arange(41)), rtol=0, atol=1e-12)
        assert (path.argmax(axis=1) == mode).all()
        rest = np.delete(path, mode, axis=1)  # what is not rewarded keeps its proportions
        np.testing.assert_allclose(rest[5] / rest[5].sum(), rest[0] / rest[0].sum(), atol=1e-12)


def test_a_mass_that_came_to_nothing_stays_there_without_a_warning():
    with np.errstate(all="raise", under="ignore"):
        path = iterate(policy([0.6, 0.4]), beta=0.05, steps=60)
    assert path[-1].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="positive weights"):
        policy([1e308, 1e308])


def test_the_rate_of_full_steps_is_exp_of_minus_one_over_beta_in_the_limit():
    path = iterate(policy([0.4, 0.35, 0.25]), beta=1.0, steps=12)
    missing = 1 - path[:, 0]
    assert missing[12] / missing[11] == pytest.approx(math.exp(-1), rel=1e-4)


@pytest.mark.parametrize(("beta", "expected"), [(0.5, 0.760), (1.0, 0.538), (2.0, 0.414)])
def test_a_fixed_reference_stays_below_one(beta, expected):
    start = policy([0.3, 0.25, 0.25, 0.2])
    path = iterate(start, beta=beta, steps=30, reference="fixed")
    np.testing.assert_allclose(path[1:, 0], fixed_reference_limit(0.3, beta), rtol=0, atol=1e-12)
    assert fixed_reference_limit(0.3, beta) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
def test_partial_steps_contract_by_their_own_rate(eta):
    path = iterate(policy([0.4, 0.35, 0.25]), beta=1.0, steps={0.1: 300, 0.5: 60, 1.0: 25}[eta], eta=eta)
    missing = 1 - path[:, 0]
    late = np.flatnonzero(missing > 1e-7)[-1]
    assert missing[late] / missing[late - 1] == pytest.approx(partial_contraction(1.0, eta), rel=1e-6)
    assert partial_contraction(1.0, 0.1) == pytest.approx(0.937, abs=5e-4)


def test_the_limit_keeps_the_proportions_within_the_majority():
    """Six responses, of which three carry the majority's answer: voting tilts all three alike."""
    start = policy([0.2, 0.15, 0.1, 0.3, 0.15, 0.1])
    majority = np.array([True, True, True, False, False, False])
    pi = start
    for _ in range(60):
        pi = regularised_optimum(pi, majority.astype(float), beta=1.0)
    np.testing.assert_allclose(pi, limit_policy(start, majority), rtol=0, atol=1e-12)


def test_winner_probabilities_equal_counting_every_outcome():
    for start, n in [(policy([0.5, 0.3, 0.2]), 5), (policy([0.6, 0.4]), 8), (policy([0.1, 0.2, 0.3, 0.4]), 4)]:
        wins = np.zeros(len(start))
        for draw in itertools.product(range(len(start)), repeat=n):
            counts = np.bincount(draw, minlength=len(start))
            tied = np.flatnonzero(counts == counts.max())
            wins[tied] += np.prod(start[list(draw)]) / len(tied)
        np.testing.assert_allclose(winner_probabilities(start, n), wins, rtol=0, atol=1e-12)


def test_votes_of_eight_are_often_wrong_about_the_mode():
    rng = np.random.default_rng(2)
    for weights in ([0.4, 0.35, 0.25], [0.3, 0.28, 0.22, 0.2], [0.6, 0.4]):
        exact = winner_probabilities(policy(weights), 8)
        counts = rng.multinomial(8, policy(weights), size=40_000)
        won = np.bincount(np.argmax(counts + rng.random(counts.shape) * 0.5, axis=1), minlength=len(weights)) / 40_000
        errors = 5 * np.sqrt(exact * (1 - exact) / 40_000)
        assert (abs(won - exact) < errors).all()
    assert winner_probabilities(policy([0.6, 0.4]), 1).tolist() == pytest.approx([0.6, 0.4])


@pytest.mark.parametrize("n", [3, 8])
def test_sampled_votes_are_their_expectation_within_monte_carlo_error(n):
    start = policy([0.4, 0.35, 0.25])
    paths = 20_000
    means, _ = sampled_vote_paths(start, beta=1.0, n=n, steps=1, paths=paths, rng=np.random.default_rng(3))
    spread = 0.5 / math.sqrt(paths)  # of a mass in 0..1, at most
    assert means[1] == pytest.approx(first_step_mass(start, 1.0, n), abs=4 * spread)


def test_one_vote_decides_the_limit_by_chance_and_many_by_the_mode():
    """With a single sample a step is a self-reinforcing urn, whose expected first step does not favour the mode's
    odds beyond its mass; with many samples the mode wins nearly always."""
    start = policy([0.5, 0.3, 0.2])
    rng = np.random.default_rng(4)
    _, few = sampled_vote_paths(start, beta=1.0, n=1, steps=60, paths=4000, rng=rng)
    _, many = sampled_vote_paths(start, beta=1.0, n=256, steps=60, paths=4000, rng=rng)
    assert 0.45 < (few == 0).mean() < 0.75
    assert (many == 0).mean() > 0.999


def test_the_dissenters_penalty_is_the_z_score_of_a_group():
    for agreeing in range(1, 16):
        rewards = np.array([1.0] * agreeing + [0.0] * (16 - agreeing))
        z = (rewards - rewards.mean()) / rewards.std()
        assert grpo_advantages(agreeing / 16) == pytest.approx((z[0], z[-1]), rel=1e-12)
    assert grpo_advantages(1.0) == (0.0, 0.0)


def test_what_is_no_policy_is_refused():
    for weights in ([1.0], [0.5, 0.0], [0.5, -0.5, 1.0], [[0.5, 0.5]], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="at least two positive weights"):
            policy(weights)
    assert vote_reward(policy([1, 3, 3])).tolist() == [0, 1, 0]
