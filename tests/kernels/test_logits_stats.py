"""logits_stats against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import RELATIVE, assert_grad_close, assert_stats_close, make_case, small_tiles, weighted_sum
from urlvr_kernels import DIFFERENTIABLE, OUTPUTS, logits_stats, reference


def logits_of(case) -> torch.Tensor:
    return case.hidden @ case.weight.T


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 4, 11), (7, 4, 129), (37, 4, 1408)])
def test_every_output_and_the_gradient_agree_with_float64_autograd(shape, dtype, inplace):
    case = make_case(*shape, dtype=dtype)
    case.target[1::4] = -100
    tau = torch.rand(shape[0], dtype=torch.float64) + 0.5
    vocab = shape[2] - 2
    case.target.clamp_(max=vocab - 1)
    leaf = logits_of(case)
    exact = leaf.double().clone().requires_grad_()
    expected = reference.logits_stats(exact, case.target, temperature=tau, vocab_size=vocab, outputs=OUTPUTS)
    weighted_sum(expected, {k: g.double() for k, g in case.grads.items()}, DIFFERENTIABLE).backward()
    for elements, rows in ((1 << 20, 256), (1024, 4)):
        logits = leaf.clone().requires_grad_()
        with small_tiles(elements, rows):
            stats = logits_stats(
                logits, case.target, temperature=tau, vocab_size=vocab, outputs=OUTPUTS, inplace_grad=inplace
            )
            weighted_sum(stats, case.grads, DIFFERENTIABLE).backward()
        assert_stats_close(stats, expected, OUTPUTS, RELATIVE[dtype])
        assert_grad_close(logits.grad, exact.grad, RELATIVE[dtype], "logits")
        assert torch.equal(logits.detach(), logits.grad if inplace else leaf)


@pytest.mark.parametrize("offset", [-1000.0, 0.0, 1000.0])
def test_the_centred_forms_do_not_feel_an_offset_of_the_logits(offset):
    logits = (torch.randn(16, 5000, generator=torch.Generator().manual_seed(0)) * 2 + offset).float()
    target = torch.arange(16)
    expected = reference.logits_stats(logits.double(), target, outputs=OUTPUTS)
    with small_tiles(1024, 4):
        stats = logits_stats(logits, target, outputs=OUTPUTS)
    assert_stats_close(stats, expected, OUTPUTS, 2e-6)


def test_masked_logits_have_finite_entropy_and_infinite_self_certainty():
    logits = torch.randn(4, 300, dtype=torch.float64)
    logits[1, 5:250] = -torch.inf
    logits[2, :299] = -torch.inf
    exact = logits.clone().requires_grad_()
    target = torch.tensor([0, 1, 299, 3])
    names = ("logp", "entropy", "lse", "top2_gap", "max_prob", "argmax")
    expected = reference.logits_stats(exact, target, outputs=(*names, "self_certainty"))
    ours = logits.clone().requires_grad_()
    with small_tiles(1024, 3):
        stats = logits_stats(ours, target, outputs=(*names, "self_certainty"))
        (stats.logp.sum() + 2 * stats.lse.sum() - stats.entropy.sum()).backward()
    assert_stats_close(stats, expected, names, 1e-12)
    assert stats.self_certainty.isinf().tolist() == [False, True, True, False]
    p = torch.softmax(logits, -1)
    entropy_term = torch.where(p > 0, p * (torch.log(p) + expected.entropy.detach()[:, None]), 0.0)
    by_hand = torch.nn.functional.one_hot(target, 300) - p + 2 * p + entropy_term
    assert_grad_close(ours.grad, by_hand, 1e-12, "logits")


def test_ignored_rows_may_hold_anything():
    logits = torch.randn(4, 30, requires_grad=True)
    with torch.no_grad():
        logits[1] = float("nan")
    stats = logits_stats(logits, torch.tensor([3, -100, 2, 1]), outputs=OUTPUTS)
    weighted_sum(stats, {k: torch.ones(4) for k in DIFFERENTIABLE}, DIFFERENTIABLE).backward()
    assert all(torch.isfinite(getattr(stats, name)).all() for name in OUTPUTS)
    assert torch.count_nonzero(logits.grad[1]) == 0
    assert torch.isfinite(logits.grad).all()


def test_after_an_in_place_backward_a_second_one_is_refused():
    logits = torch.randn(4, 30).requires_grad_() * 1.0
    loss = logits_stats(logits, torch.arange(4), inplace_grad=True).logp.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_statistics_that_need_no_target_can_be_had_without_one():
    logits = torch.randn(4, 30)
    stats = logits_stats(logits, None, outputs=("entropy", "self_certainty"))
    expected = reference.logits_stats(logits.double(), None, outputs=("entropy", "self_certainty"))
    assert_stats_close(stats, expected, ("entropy", "self_certainty"), 1e-6)
    assert stats.logp is None
    assert stats.present() == {"entropy", "self_certainty"}
