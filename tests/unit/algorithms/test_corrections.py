"""Off-policy weights against scalar arithmetic in float64, and totals that do not care who holds which response."""

import math
import random

import pytest
import torch

from megatron_urlvr.algorithms.corrections import Mismatch, log_ratios, mismatch, weight_totals, weights
from megatron_urlvr.config.algorithm import AlgorithmSection, CorrectionSection
from megatron_urlvr.config.base import RuleError

METHODS = ["truncate", "mask", "sequence", "reject"]


class Responses:
    """Log-probs of trainer and engine, as lists of Python floats. No ratio lies on a bound."""

    def __init__(self, seed, count=12):
        rng = random.Random(seed)
        lengths = [rng.randint(1, 9) for _ in range(count)]
        self.engine = [[-3 * rng.random() for _ in range(t)] for t in lengths]
        self.trainer = [[x + rng.gauss(0.0, 0.6) for x in row] for row in self.engine]

    def tensors(self, part):
        return [log_ratios(torch.tensor(self.trainer[i]), torch.tensor(self.engine[i])) for i in part]


def oracle(trainer, engine, method, low, high):
    """The weights as they are printed, one token after the other."""
    ratio = [math.exp(p - mu) for p, mu in zip(trainer, engine, strict=True)]
    geometric = math.prod(ratio) ** (1 / len(ratio))
    if method == "truncate":
        return [min(r, high) for r in ratio]
    if method == "mask":
        return [r if low <= r <= high else 0.0 for r in ratio]
    if method == "sequence":
        return [min(geometric, high)] * len(ratio)
    return [1.0 if low <= geometric <= high else 0.0] * len(ratio)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (0.9, 1.1), (0.0, 1.0)])
def test_weights_are_those_of_scalar_arithmetic(method, low, high):
    batch = Responses(seed=3)
    lower = {"low": low} if method in ("mask", "reject") else {}  # the others refuse what they would not read
    section = CorrectionSection(method=method, high=high, **lower)
    for i, difference in enumerate(batch.tensors(range(12))):
        expected = oracle(batch.trainer[i], batch.engine[i], method, low, high)
        found = weights(difference, section)
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_an_engine_that_agrees_leaves_every_weight_one(method):
    same = torch.tensor([-0.5, -2.0, -0.1])
    assert weights(log_ratios(same, same), CorrectionSection(method=method)).tolist() == [1.0] * 3


def test_an_absurd_difference_stays_finite():
    difference = log_ratios(torch.tensor([0.0, -500.0]), torch.tensor([-500.0, 0.0]))
    assert torch.isfinite(weights(difference, CorrectionSection(method="sequence"))).all()
    assert math.isfinite(mismatch([difference]).metrics()["mismatch/ess"])


def test_truncated_weights_make_the_engines_samples_estimate_the_trainers_mean():
    """E_mu[w f] = E_p[f] as long as no ratio reaches the bound: importance sampling, checked over all outcomes."""
    mu, p = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.6, 0.25, 0.15])
    value = torch.tensor([1.0, -2.0, 5.0])
    w = weights(log_ratios(p.log(), mu.log()), CorrectionSection(method="truncate"))
    assert float((mu * w * value).sum()) == pytest.approx(float((p * value).sum()), rel=1e-6)


@pytest.mark.parametrize("shards", [[range(12)], [range(5), range(5, 12)], [[i] for i in range(12)], [[], range(12)]])
def test_totals_do_not_depend_on_who_holds_which_response(shards):
    batch = Responses(seed=8)
    total = sum((mismatch(batch.tensors(part)) for part in shards), Mismatch())
    differences = [p - mu for i in range(12) for p, mu in zip(batch.trainer[i], batch.engine[i], strict=True)]
    ratios = [math.exp(d) for d in differences]
    n = len(differences)
    found = total.metrics()
    assert found["mismatch/logp_abs_diff"] == pytest.approx(sum(map(abs, differences)) / n, rel=1e-6)
    assert found["mismatch/logp_max_diff"] == pytest.approx(max(map(abs, differences)), rel=1e-6)
    assert found["mismatch/kl"] == pytest.approx(-sum(differences) / n, rel=1e-5)
    assert found["mismatch/ess"] == pytest.approx(sum(ratios) ** 2 / n / sum(r * r for r in ratios), rel=1e-6)
    for method, name, expected in (
        ("mask", "correction/zero", sum(not 0.5 <= r <= 2 for r in ratios)),
        ("truncate", "correction/capped", sum(r >= 2 for r in ratios)),
        ("truncate", "correction/weight", sum(min(r, 2) for r in ratios)),
    ):
        section = CorrectionSection(method=method)
        counts = [weight_totals([weights(d, section) for d in batch.tensors(part)], section) for part in shards]
        assert sum(each[name][0] for each in counts) == pytest.approx(expected, rel=1e-6)
        assert sum(each[name][1] for each in counts) == n


def test_the_effective_sample_size_of_one_heavy_token_is_one_token():
    heavy = torch.zeros(100, dtype=torch.float64)
    heavy[0] = 15.0
    assert mismatch([heavy]).metrics()["mismatch/ess"] == pytest.approx(1 / 100, rel=1e-3)
    assert mismatch([torch.zeros(100, dtype=torch.float64)]).metrics()["mismatch/ess"] == 1.0
    assert mismatch([]).metrics() == {}


def test_log_probs_of_other_lengths_are_an_error():
    with pytest.raises(ValueError, match="one each a token"):
        log_ratios(torch.zeros(3), torch.zeros(2))


def test_the_same_ratio_is_never_counted_twice():
    with pytest.raises(ValueError, match="would count the same ratio twice") as error:
        CorrectionSection(old_logp="rollout", method="truncate")
    assert isinstance(error.value.errors()[0]["ctx"]["error"], RuleError)
    with pytest.raises(ValueError, match="has no ratio"):
        AlgorithmSection.model_validate({"loss": {"name": "em_ft"}, "correction": {"old_logp": "rollout"}})
