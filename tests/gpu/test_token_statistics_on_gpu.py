"""The kernels on a real GPU: both backends against float64, and what no emulation can show.

Everything that can be tested without a GPU is in `tests/kernels`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from kernel_cases import (
    Case,
    assert_grad_close,
    assert_stats_close,
    make_case,
    oracle,
    weighted_sum,
)
from urlvr_kernels import DIFFERENTIABLE, OUTPUTS, cuda_build, lm_head_stats, logits_stats, reference, sglang_plugin

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")]

BACKENDS = ["triton", "torch"] + (["cuda"] if cuda_build.find_nvcc() else [])
FORMS = {"recompute": {"stash_bytes": 0}, "stash": {"stash_bytes": 1 << 30}, "one pass": {}}


def run(case: Case, backend: str, form: str = "recompute", **arguments: object):
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    upstream = case.grads if form == "one pass" else None
    stats = lm_head_stats(
        hidden, weight, case.target, outputs=OUTPUTS, backend=backend, upstream=upstream, **FORMS[form], **arguments
    )
    (stats.loss if upstream else weighted_sum(stats, case.grads, DIFFERENTIABLE)).backward()
    return stats, hidden.grad, weight.grad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 64, 11), (37, 80, 1408), (777, 128, 18992), (64, 64, 50257)])
def test_float32_agrees_with_float64_autograd(shape, backend, form, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    case = make_case(*shape, dtype=torch.float32)
    case.target[1::5] = -100
    case.target.clamp_(max=shape[2] - 5)
    case.hidden[1::5] = float("nan")
    tau = torch.rand(shape[0]) + 0.5
    case, tau = case.on("cuda"), tau.cuda()
    clean = Case(torch.nan_to_num(case.hidden), case.weight, case.target, case.grads)
    expected = oracle(clean, OUTPUTS, DIFFERENTIABLE, temperature=tau.double(), vocab_size=shape[2] - 4)
    found = run(case, backend, form, temperature=tau, vocab_size=shape[2] - 4, workspace_bytes=1 << 20)
    assert_stats_close(found[0], expected[0], OUTPUTS, 2e-5)
    assert_grad_close(found[1], expected[1], 2e-5, "hidden")
    assert_grad_close(found[2], expected[2], 2e-5, "weight")


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_errs_no_more_than_materialised_torch(backend, form, logits_dtype):
    case = make_case(512, 896, 151936, dtype=torch.bfloat16).on("cuda")
    expected = oracle(case, OUTPUTS, DIFFERENTIABLE)
    found = run(case, backend, form, logits_dtype=logits_dtype, workspace_bytes=64 << 20)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    plain = reference.logits_stats((hidden @ weight.T).float(), case.target, outputs=OUTPUTS)
    weighted_sum(plain, case.grads, DIFFERENTIABLE).backward()
    for name in ("logp", "entropy", "self_certainty", "lse", "max_prob"):
        ours, theirs = ((getattr(x, name).double() - getattr(expected[0], name)).abs().max() for x in (found[0], plain))
        assert ours <= 1.5 * theirs + 1e-6, name
    for ours, theirs, exact in ((found[1], hidden.grad, expected[1]), (found[2], weight.grad, expected[2])):
        assert (ours.double() - exact).norm() <= 1.2 * (theirs.double() - exact).norm() + 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 151936), (3, 50257), (64, 32000), (2000, 1003)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_any_alignment_and_mask(backend, rows, columns, dtype):
    g = torch.Generator("cuda").manual_seed(0)
    logits = (3 * torch.randn(rows, columns + 7, generator=g, device="cuda")).to(dtype)[:, 3 : columns + 3]
    logits[:, 100:200] = -torch.inf
    target = torch.randint(0, 100, (rows,), device="cuda")
    names = ("logp", "entropy", "lse", "top2_gap", "max_prob", "argmax")
    exact = logits.double().requires_grad_()
    expected = reference.logits_stats(exact, target, outputs=names)
    (expected.logp.sum() + 2 * expected.lse.sum()).backward()
    ours = logits.detach().requires_grad_()
    stats = logits_stats(ours, target, outputs=names, backend=backend)
    (stats.logp.sum() + 2 * stats.lse.sum()).backward()
    assert_stats_close(stats, expected, names, 1e-5)
    assert_grad_close(ours.grad, exact.grad, 2 * torch.finfo(dtype).eps, "logits")


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_are_the_same_bits_and_wait_for_nothing(backend):
    case = make_case(300, 256, 32000, dtype=torch.bfloat16).on("cuda")
    for form in FORMS:
        first = run(case, backend, form)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = run(case, backend, form)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(first[1], second[1])
        assert torch.equal(first[2], second[2])
        assert all(torch.equal(getattr(first[0], name), getattr(second[0], name)) for name in OUTPUTS)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_more_rows_than_a_grid_axis_and_more_logits_than_32_bits(backend):
    rows, columns = 65537, 33000
    logits = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    logits[-1, 32999] = 5.0
    target = torch.full((rows,), 32999, device="cuda")
    stats = logits_stats(logits, target, outputs=("logp", "argmax"), backend=backend)
    assert stats.argmax[-1] == 32999
    expected = reference.logits_stats(logits[-1:].double(), target[-1:])
    assert torch.allclose(stats.logp[-1].double(), expected.logp[0], atol=1e-5)
    assert (stats.logp[:-1] - stats.logp[0]).abs().max() == 0


def test_a_backward_in_an_autograd_thread_uses_the_tensors_device():
    device = f"cuda:{torch.cuda.device_count() - 1}"
    case = make_case(16, 64, 1000, dtype=torch.bfloat16).on(device)
    found = run(case, "triton")
    assert found[1].device == torch.device(device)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_the_forward_can_be_captured_in_a_cuda_graph(backend):
    case = make_case(16, 64, 1000, dtype=torch.bfloat16).on("cuda")

    def forward() -> torch.Tensor:
        return lm_head_stats(case.hidden, case.weight, None, outputs=("entropy",), backend=backend).entropy

    with torch.no_grad():
        expected = forward().clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = forward()
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


def test_main_grad_takes_the_gradient_in_float32():
    case = make_case(300, 256, 5000, dtype=torch.bfloat16).on("cuda")
    weight = case.weight.clone().requires_grad_()
    weight.main_grad = torch.ones(5000, 256, device="cuda")
    stats = lm_head_stats(case.hidden, weight, case.target, wgrad="main_grad", stash_bytes=0, workspace_bytes=1 << 20)
    weighted_sum(stats, case.grads, ("logp",)).backward()
    expected = oracle(case, ("logp",), ("logp",))[2]
    assert_grad_close(weight.main_grad - 1, expected, 1e-2, "weight")


def test_the_sglang_plug_in_copies_once_and_asynchronously():
    logits = torch.randn(4, 32000, device="cuda", dtype=torch.bfloat16)
    output = SimpleNamespace(next_token_logits=logits, customized_info=None)
    sampling = SimpleNamespace(temperatures=torch.ones(4, 1, device="cuda"))
    sglang_plugin.add_statistics(output, sampling, ("entropy", "self_certainty"))  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sglang_plugin.add_statistics(output, sampling, ("entropy", "self_certainty"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = reference.logits_stats(logits.double(), None, outputs=("entropy",))
    assert [output.customized_info["entropy"][i] for i in range(4)] == pytest.approx(
        expected.entropy.tolist(), rel=1e-4
    )
