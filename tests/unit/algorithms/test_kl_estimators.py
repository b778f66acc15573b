"""KL estimators by enumeration of a small vocabulary: what they estimate and which way their gradients pull."""

import math

import pytest
import torch
from torch.testing import assert_close

from megatron_urlvr.algorithms.kl import ESTIMATORS, k1, k2, k3, reward_penalty

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(9, generator=GENERATOR, dtype=torch.float64)
REF = torch.randn(9, generator=GENERATOR, dtype=torch.float64).log_softmax(-1)


def expectation_and_gradient(estimator):
    """E_p[k] and E_p[grad k] over all tokens; the sampling itself is not differentiated, as in training."""
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    value = (logp.detach().exp() * ESTIMATORS[estimator](logp, REF)).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return value.item(), gradient


def kl_and_gradient(forward):
    """KL(p || ref), or KL(ref || p), and its gradient in p's logits."""
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    value = (REF.exp() * (REF - logp)).sum() if forward else (logp.exp() * (logp - REF)).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return value.item(), gradient


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    assert expectation_and_gradient(estimator)[0] == pytest.approx(kl_and_gradient(forward=False)[0])


def test_k1_in_the_loss_pulls_nowhere():
    assert_close(expectation_and_gradient("k1")[1], torch.zeros(9, dtype=torch.float64), rtol=0, atol=1e-15)


def test_k2_pulls_down_kl_to_the_reference():
    assert_close(expectation_and_gradient("k2")[1], kl_and_gradient(forward=False)[1])


def test_k3_pulls_down_kl_from_the_reference():
    assert_close(expectation_and_gradient("k3")[1], kl_and_gradient(forward=True)[1])


def test_values_are_the_formulas():
    for logp, ref in [(-1.0, -1.0), (-0.3, -2.0), (-5.0, -0.1)]:
        d = logp - ref
        p, q = torch.tensor(logp, dtype=torch.float64), torch.tensor(ref, dtype=torch.float64)
        assert k1(p, q).item() == pytest.approx(d)
        assert k2(p, q).item() == pytest.approx(d * d / 2)
        assert k3(p, q).item() == pytest.approx(math.exp(-d) - 1 + d)


def test_k3_is_never_negative_in_float32_and_survives_any_distance():
    logp = torch.tensor([-1.0, -1.0, -200.0, -1e-3], requires_grad=True)
    ref = torch.tensor([-1.0, -1.0000001, -0.5, -300.0])
    value = k3(logp, ref)
    value.sum().backward()
    assert (value >= 0).all()
    assert value.isfinite().all()
    assert logp.grad.isfinite().all()


def test_the_penalty_in_the_reward_sums_over_the_response():
    logp = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])]
    ref = [torch.tensor([-1.5, -1.0]), torch.tensor([-2.5])]
    assert reward_penalty(logp, ref, "k1").tolist() == pytest.approx([-0.5, 2.0])
    assert reward_penalty(logp, ref, "k2").tolist() == pytest.approx([0.125 + 0.5, 2.0])
    expected = [math.exp(-0.5) - 1 + 0.5 + math.exp(1) - 1 - 1, math.exp(-2) - 1 + 2]
    assert reward_penalty(logp, ref, "k3").tolist() == pytest.approx(expected)
