"""AUROC against all pairs."""

import itertools
import random

import pytest

from megatron_urlvr.algorithms.ranking import auroc


def all_pairs(scores, positive):
    pairs = [
        (s > t) + 0.5 * (s == t)
        for (s, p), (t, q) in itertools.product(list(zip(scores, positive, strict=True)), repeat=2)
        if p and not q
    ]
    return sum(pairs) / len(pairs) if pairs else None


def test_auroc_is_the_share_of_ordered_pairs_with_ties_a_half():
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(1, 12)
        scores = [rng.choice([0.0, 0.5, 1.0, rng.random()]) for _ in range(n)]
        positive = [rng.random() < 0.4 for _ in range(n)]
        expected = all_pairs(scores, positive)
        assert auroc(scores, positive) == (None if expected is None else pytest.approx(expected))


def test_a_constant_score_knows_nothing():
    assert auroc([1, 1, 1, 1], [True, False, False, True]) == 0.5
