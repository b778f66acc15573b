"""The one-pass form: what it gives, and every use of it that would give a wrong gradient refused."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import assert_grad_close, assert_stats_close, make_case, oracle, small_tiles, weighted_sum
from urlvr_kernels import DIFFERENTIABLE, OUTPUTS, lm_head_stats


@pytest.mark.parametrize("outputs", [OUTPUTS, DIFFERENTIABLE], ids=["with the order of logits", "without"])
@pytest.mark.parametrize("workspace", [1, 20_000, 1 << 24])
@pytest.mark.parametrize("names", [("logp",), ("self_certainty",), ("entropy", "lse"), DIFFERENTIABLE])
def test_its_gradients_are_those_of_the_two_pass_form(names, workspace, outputs):
    case = make_case(37, 12, 300)
    case.target[5] = -100
    tau = torch.rand(37, dtype=torch.float64) + 0.5
    expected = oracle(case, OUTPUTS, names, temperature=tau, vocab_size=None)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    upstream = {name: case.grads[name] for name in names}
    with small_tiles(1024, 8):
        stats = lm_head_stats(
            hidden, weight, case.target, temperature=tau, outputs=outputs, upstream=upstream, workspace_bytes=workspace
        )
    stats.loss.backward()
    assert_stats_close(stats, expected[0], outputs, 1e-11)
    assert_grad_close(hidden.grad, expected[1], 1e-11, "hidden")
    assert_grad_close(weight.grad, expected[2], 1e-11, "weight")
    assert torch.allclose(stats.loss.detach(), weighted_sum(expected[0], case.grads, names).detach())


def test_bfloat16_gradients_agree_with_the_two_pass_form_to_one_rounding():
    case = make_case(37, 12, 300, dtype=torch.bfloat16)
    grads = []
    for upstream in (None, {"logp": case.grads["logp"]}):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        stats = lm_head_stats(hidden, weight, case.target, upstream=upstream, workspace_bytes=20_000)
        (stats.loss if upstream else weighted_sum(stats, case.grads, ("logp",))).backward()
        grads.append((hidden.grad, weight.grad))
    for a, b, name in zip(*grads, ("hidden", "weight"), strict=True):
        assert_grad_close(a, b, 1e-3, name)


def forward(hidden: torch.Tensor | None = None, **more: object):
    case = make_case(6, 4, 20)
    hidden = case.hidden.clone().requires_grad_() if hidden is None else hidden
    weight = case.weight.clone().requires_grad_()
    return lm_head_stats(hidden, weight, case.target, upstream={"logp": case.grads["logp"]}, **more), hidden


def test_a_loss_built_from_the_statistics_is_refused():
    stats, _ = forward()
    with pytest.raises(RuntimeError, match=r"^upstream: .* only `stats.loss` carries a gradient"):
        (stats.logp.exp().sum() + stats.loss).backward()


@pytest.mark.parametrize("factor", [0.5, -1.0, 0.0, 1.0 + 1e-12, float("nan")])
def test_a_scaled_loss_is_refused(factor):
    stats, _ = forward()
    with pytest.raises(RuntimeError, match=r"^upstream: the gradient that reaches `stats.loss` must be exactly 1"):
        (stats.loss * factor).backward()


def test_a_sum_with_another_loss_is_allowed():
    stats, hidden = forward()
    (stats.loss + (hidden**2).sum()).backward()
    alone, same = forward()
    alone.loss.backward()
    assert torch.allclose(hidden.grad, same.grad + 2 * hidden)


def test_a_second_backward_is_refused():
    stats, _ = forward()
    stats.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^upstream: .* call backward once"):
        stats.loss.backward()


def test_without_gradients_it_is_a_plain_forward_that_touches_nothing():
    case = make_case(6, 4, 20)
    weight = case.weight.clone().requires_grad_()
    weight.main_grad = torch.zeros_like(weight)
    with torch.no_grad():
        stats = lm_head_stats(
            case.hidden, weight, case.target, upstream={"logp": case.grads["logp"]}, wgrad="main_grad"
        )
    expected = oracle(case, ("logp",), ())[0]
    assert torch.allclose(stats.loss, (case.grads["logp"] * expected.logp).sum())
    assert torch.count_nonzero(weight.main_grad) == 0
