"""Products of a GPU added to a wider sum, with the rules of its library laid over the CPU's: no GPU is needed."""

from __future__ import annotations

import pytest
import torch
from urlvr_kernels import gemm


@pytest.fixture(params=["adds to a wider sum", "refuses a wider sum"])
def library(request, monkeypatch):
    """torch on CUDA, whose `addmm` took no sum wider than its factors before 2.10 (aten/native/cuda/Blas.cpp)."""
    mm, addmm = torch.mm, torch.addmm

    def wider_mm(left, right, *, out_dtype=None, out=None):
        product = mm(left.float(), right.float()) if out_dtype else mm(left, right)
        return product if out is None else out.copy_(product)

    def wider_addmm(total, left, right, *, out_dtype, out):
        if request.param == "refuses a wider sum" and total.dtype != left.dtype:
            raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
        return out.copy_(addmm(total, left.to(out_dtype), right.to(out_dtype)))

    monkeypatch.setattr(torch, "mm", wider_mm)
    monkeypatch.setattr(torch, "addmm", wider_addmm)
    monkeypatch.setattr(gemm, "on_cpu", lambda tensor: False)
    gemm.adds_to_wider_sum.cache_clear()
    yield
    gemm.adds_to_wider_sum.cache_clear()


@pytest.mark.parametrize("band_bytes", [1, 4 * 8 * 3, 64 << 20])
def test_half_precision_factors_are_added_to_a_float32_sum_whatever_the_library_takes(library, monkeypatch, band_bytes):
    monkeypatch.setattr(gemm, "BAND_BYTES", band_bytes)
    left, right = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((10, 5), (5, 8)))
    before = torch.randn(12, 8)
    total = before.clone()
    gemm.accumulate(total[1:11], left, right, fresh=False)
    assert torch.allclose(total[1:11], before[1:11] + left.float() @ right.float(), atol=1e-5)
    assert torch.equal(total[[0, 11]], before[[0, 11]])
    gemm.accumulate(total[1:11], left, right, fresh=True)
    assert torch.allclose(total[1:11], left.float() @ right.float(), atol=1e-5)
