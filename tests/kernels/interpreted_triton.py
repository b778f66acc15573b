"""The Triton kernels in Triton's interpreter; run by `test_triton_interpreter.py` in a process of its own.

The interpreter truncates on its way to bfloat16 where hardware rounds, so bfloat16 results are compared to two units
in the last place. What it cannot show: races, register and shared-memory limits, speed.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Case, assert_grad_close, assert_stats_close, make_case, oracle, small_tiles, weighted_sum
from urlvr_kernels import DIFFERENTIABLE, OUTPUTS, lm_head_stats, logits_stats, reference, triton_ops
from urlvr_kernels.rowstate import Wanted, empty_state, merge

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NumPy speaks up where a GPU is silent about inf - inf


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks so small that rows span several of them, and few enough rows wanted that some are split."""
    monkeypatch.setattr(triton_ops, "STATE_BLOCK", 64)
    monkeypatch.setattr(triton_ops, "DLOGITS_BLOCK", 64)
    monkeypatch.setattr(triton_ops, "MERGE_BLOCK", 8)
    monkeypatch.setattr(triton_ops, "PROGRAMS_WANTED", 24)


def run(case: Case, **arguments: object):
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    stats = lm_head_stats(hidden, weight, case.target, outputs=OUTPUTS, backend="triton", **arguments)
    (weighted_sum(stats, case.grads, DIFFERENTIABLE) if stats.loss is None else stats.loss).backward()
    return stats, hidden.grad, weight.grad


@pytest.mark.parametrize("form", ["recompute", "stash", "one pass"])
@pytest.mark.parametrize("shape", [(1, 8, 11), (9, 16, 301)])
def test_float32_agrees_with_float64_autograd(shape, form):
    case = make_case(*shape, dtype=torch.float32)
    case.target[2::4] = -100
    case.target.clamp_(max=shape[2] - 4)
    case.target = case.target.int()
    tau = torch.rand(shape[0]) + 0.5
    expected = oracle(case, OUTPUTS, DIFFERENTIABLE, temperature=tau.double(), vocab_size=shape[2] - 3)
    with small_tiles(1024, 5):
        found = run(
            case,
            temperature=tau,
            vocab_size=shape[2] - 3,
            stash_bytes=1 << 20 if form == "stash" else 0,
            workspace_bytes=8192,
            upstream=case.grads if form == "one pass" else None,
        )
    assert_stats_close(found[0], expected[0], OUTPUTS, 1e-5)
    assert_grad_close(found[1], expected[1], 1e-5, "hidden")
    assert_grad_close(found[2], expected[2], 1e-5, "weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_what_plain_torch_gives_for_them(dtype):
    case = make_case(7, 16, 150, dtype=dtype)
    found = run(case, logits_dtype=dtype, stash_bytes=0, temperature=0.8)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    stats = lm_head_stats(
        hidden,
        weight,
        case.target,
        outputs=OUTPUTS,
        backend="torch",
        logits_dtype=dtype,
        stash_bytes=0,
        temperature=0.8,
    )
    weighted_sum(stats, case.grads, DIFFERENTIABLE).backward()
    assert_stats_close(found[0], stats, OUTPUTS, 1e-5)
    two_ulp = 2 * torch.finfo(dtype).eps
    assert_grad_close(found[1], hidden.grad, two_ulp, "hidden")
    assert_grad_close(found[2], weight.grad, two_ulp, "weight")


@pytest.mark.parametrize("inplace", [False, True])
def test_logits_rows_are_split_and_padding_masked(inplace):
    case = make_case(3, 4, 500, dtype=torch.float32)
    logits = case.hidden @ case.weight.T
    logits[:, 490:] = 1e4
    case.target %= 490
    exact = logits.double().requires_grad_()
    expected = reference.logits_stats(exact, case.target, vocab_size=490, outputs=OUTPUTS)
    weighted_sum(expected, {k: g.double() for k, g in case.grads.items()}, DIFFERENTIABLE).backward()
    ours = logits.clone().requires_grad_()
    stats = logits_stats(ours, case.target, vocab_size=490, outputs=OUTPUTS, inplace_grad=inplace, backend="triton")
    weighted_sum(stats, case.grads, DIFFERENTIABLE).backward()
    assert_stats_close(stats, expected, OUTPUTS, 1e-5)
    assert_grad_close(ours.grad, exact.grad, 1e-5, "logits")


@pytest.mark.parametrize("offset", [-1000.0, -200.0, 1000.0])
def test_offsets_do_not_matter(offset):
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(1)) * 3 + offset
    target = torch.tensor([0, 63, 64, 299])
    expected = reference.logits_stats(logits.double(), target, outputs=OUTPUTS)
    assert_stats_close(logits_stats(logits, target, outputs=OUTPUTS, backend="triton"), expected, OUTPUTS, 3e-6)


def test_masked_logits_have_finite_entropy_and_gradients():
    logits = torch.randn(3, 300)
    logits[0, 5:250] = -torch.inf
    logits[1, :299] = -torch.inf
    target = torch.tensor([0, 299, 7])
    names = ("logp", "entropy", "lse", "top2_gap", "max_prob", "argmax")
    expected = reference.logits_stats(logits.double(), target, outputs=names)
    ours = logits.requires_grad_()
    stats = logits_stats(ours, target, outputs=(*names, "self_certainty"), backend="triton")
    (stats.logp + stats.entropy).sum().backward()
    assert_stats_close(stats, expected, names, 1e-5)
    assert stats.self_certainty.isinf().tolist() == [True, True, False]
    assert torch.isfinite(ours.grad).all()


def test_of_equal_maxima_in_different_blocks_the_lowest_id_wins():
    logits = torch.zeros(2, 400)
    logits[:, [70, 71, 200, 399]] = 3.0
    stats = logits_stats(logits, None, outputs=("argmax", "top2_gap"), backend="triton")
    assert stats.argmax.tolist() == [70, 70]
    assert stats.top2_gap.abs().max() == 0


def test_nan_in_a_row_is_never_turned_into_a_number():
    logits = torch.randn(2, 200)
    logits[0, 150] = float("nan")
    stats = logits_stats(logits, torch.tensor([1, 1]), backend="triton")
    assert torch.isnan(stats.logp[0])
    assert torch.isnan(stats.entropy[0])
    assert torch.isfinite(stats.logp[1])


def test_logits_with_strided_rows_or_columns_are_read_right():
    logits = torch.randn(6, 200)
    target = torch.arange(3)
    for view in (logits[::2], torch.randn(200, 3).T):
        expected = reference.logits_stats(view.double(), target)
        leaf = view.detach().requires_grad_()
        stats = logits_stats(leaf, target, backend="triton")
        stats.entropy.sum().backward()
        assert_stats_close(stats, expected, ("logp", "entropy", "self_certainty"), 1e-5)


def test_merging_on_the_device_equals_merging_in_torch():
    wanted = Wanted(True, True, True, True, True)
    parts = [torch.randn(8, 11) for _ in range(3)] + [empty_state(0, 11, like=torch.empty(0), dtype=torch.float32)]
    for i, part in enumerate(parts[:3]):
        part[1], part[5], part[7] = part[1].abs() + 0.1, 17 + i, torch.arange(11) + 20 * i
    parts[1][0, 4] = parts[2][0, 4] = 9.0  # a tie across parts
    for part in parts[:3]:
        part[6] = part[0] - part[6].abs()
    # As ranks' states arrive: numbers about a shard lie between them.
    states = torch.zeros(4, 8 * 11 + 4)[:, : 8 * 11].view(4, 8, 11).copy_(torch.stack([parts[3], *parts[:3]]))
    expected, found = merge(states.double(), wanted), triton_ops.TritonOps().merge(states, wanted)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)
