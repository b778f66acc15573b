"""Sharpening in exact tabular policies: what the theorems of arXiv 2603.08660 say, computed, and where they stop.

A policy is a table `pi: [K]` over the answers to one prompt, `float64`, summing to 1. The reward of voting is
`r(a) = 1[a = majority]`, and one step maximises `E_pi[r] - beta KL(pi || reference)`, whose optimum is
`pi* = reference exp(r / beta) / Z` (`regularised_optimum`). What differs is the reference, how far a step goes, and
which answer the vote elects:

| | reference | step | vote |
|---|---|---|---|
| `iterate(reference="moving")` | the policy of the step before | a share `eta` of the way | the exact mode |
| `iterate(reference="fixed")` | the start | a share `eta` of the way | the exact mode |
| `sampled_vote_paths` | moving | all of the way | the mode of n samples: the winner is random |

With p the mass of the majority: the moving reference multiplies the odds by `exp(1/beta)` a step and goes to 1
(Theorem 1 of the paper); the fixed one stays at `fixed_reference_limit` < 1; partial steps contract the rest by
`1 - eta (1 - exp(-1/beta))` in the limit, and not by `exp(-1/beta)`. Closed forms stand beside the computations, for
`urlvr theory` and the tests to compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import exp, lgamma
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def policy(weights: ArrayLike) -> Floats:
    """A tabular policy from positive weights `[K]`. ValueError for others, fewer than two, or an infinite sum."""
    table = np.asarray(weights, dtype=np.float64)
    with np.errstate(over="ignore"):
        finite = np.isfinite(table.sum())
    if table.ndim != 1 or len(table) < 2 or not finite or (table <= 0).any():
        raise ValueError(f"a tabular policy needs at least two positive weights, not {weights!r}")
    return table / table.sum()


def regularised_optimum(reference: Floats, reward: Floats, beta: float) -> Floats:
    """`argmax_pi E_pi[reward] - beta KL(pi || reference)`, which is `reference exp(reward / beta) / Z`."""
    with np.errstate(divide="ignore"):  # an answer whose mass has come to nothing stays there
        tilted: Floats = np.log(reference) + reward / beta
    tilted = np.exp(tilted - tilted.max())
    return tilted / tilted.sum()


def objective(pi: Floats, reference: Floats, reward: Floats, beta: float) -> float:
    """`E_pi[reward] - beta KL(pi || reference)`."""
    held = pi > 0
    return float(pi @ reward - beta * (pi[held] * (np.log(pi[held]) - np.log(reference[held]))).sum())


def vote_reward(pi: Floats) -> Floats:
    """`1[a = argmax pi]`, `[K]`; the first of equals."""
    return (np.arange(len(pi)) == int(np.argmax(pi))).astype(np.float64)


def iterate(
    start: Floats,
    *,
    beta: float,
    steps: int,
    reference: Literal["moving", "fixed"] = "moving",
    eta: float = 1.0,
) -> Floats:
    """Policies after 0..steps updates, `[steps + 1, K]`, voting with the exact mode of each."""
    path = [start]
    for _ in range(steps):
        pi = path[-1]
        target = regularised_optimum(pi if reference == "moving" else start, vote_reward(pi), beta)
        path.append(pi + eta * (target - pi))
    return np.stack(path)


def majority_mass(p0: float, beta: float, step: ArrayLike) -> Floats:
    """Closed form for the moving reference: odds of the majority grow by `exp(1/beta)` a step."""
    return 1.0 / (1.0 + (1.0 - p0) / p0 * np.exp(-np.asarray(step, dtype=np.float64) / beta))


def fixed_reference_limit(p0: float, beta: float) -> float:
    """Closed form for the fixed reference: where it stays from the first step on, `< 1`."""
    return float(majority_mass(p0, beta, 1))


def partial_contraction(beta: float, eta: float) -> float:
    """Limit of `(1 - p_{k+1}) / (1 - p_k)` under a moving reference and steps of a share `eta` of the way."""
    return 1.0 - eta * (1.0 - exp(-1.0 / beta))


def limit_policy(start: Floats, majority: Floats) -> Floats:
    """`start` renormalised on the members of the majority, `majority: [K]` bool: the limit of voting over responses
    of which several carry the same answer. Their proportions stay."""
    kept = np.where(majority, start, 0.0)
    return kept / kept.sum()


# -- votes of finite samples ------------------------------------------------------------------------------------------


def winner_probabilities(pi: Floats, n: int) -> Floats:
    """Chance that each answer wins the vote of n samples, `[K]`, tied winners sharing: exact, from the multinomial
    distribution of the counts. Needs C(n + K - 1, K - 1) terms, so small n and K."""
    wins = np.zeros(len(pi))
    logs = np.log(pi)
    for counts in _compositions(n, len(pi)):
        best = max(counts)
        tied = [a for a, count in enumerate(counts) if count == best]
        log_chance = lgamma(n + 1) + sum(c * logs[a] - lgamma(c + 1) for a, c in enumerate(counts))
        wins[tied] += exp(log_chance) / len(tied)
    return wins


def _compositions(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write n as a sum of `parts` non-negative integers, in order."""
    if parts == 1:
        yield (n,)
        return
    for first in range(n + 1):
        for rest in _compositions(n - first, parts - 1):
            yield (first, *rest)


def sampled_vote_paths(
    start: Floats, *, beta: float, n: int, steps: int, paths: int, rng: np.random.Generator
) -> tuple[Floats, NDArray[np.int64]]:
    """Independent paths of a moving reference with the vote of n samples at each step.

    Returns the mean mass of the start's mode after 0..steps updates, `[steps + 1]`, and the mode of each path at the
    end, `[paths]`. Ties go to one of the winners at random.
    """
    logits = np.tile(np.log(start), (paths, 1))
    mode = int(np.argmax(start))
    means = [float(start[mode])]
    for _ in range(steps):
        pi = np.exp(logits - logits.max(axis=1, keepdims=True))
        pi /= pi.sum(axis=1, keepdims=True)
        counts = rng.multinomial(n, pi)
        winner = np.argmax(counts + rng.random(counts.shape) * 0.5, axis=1)
        logits[np.arange(paths), winner] += 1.0 / beta
        logits -= logits.max(axis=1, keepdims=True)
        mass = np.exp(logits)
        means.append(float((mass[:, mode] / mass.sum(axis=1)).mean()))
    return np.array(means), np.argmax(logits, axis=1)


def first_step_mass(start: Floats, beta: float, n: int) -> float:
    """Expected mass of the mode after one step with the vote of n samples: closed, over `winner_probabilities`."""
    mode = int(np.argmax(start))
    chance = winner_probabilities(start, n)
    after = [regularised_optimum(start, np.eye(len(start))[a], beta)[mode] for a in range(len(start))]
    return float(chance @ np.array(after))


# -- what gradients of finite groups do -------------------------------------------------------------------------------


def grpo_advantages(p: float) -> tuple[float, float]:
    """Advantages of majority and dissent when a share p of a group agrees: `sqrt((1-p)/p)` and `-sqrt(p/(1-p))`. The
    penalty of the last dissenters grows without bound, until a unanimous group teaches nothing."""
    if not 0 < p < 1:
        return 0.0, 0.0
    return ((1 - p) / p) ** 0.5, -((p / (1 - p)) ** 0.5)
