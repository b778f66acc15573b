"""The matrix products of a vocabulary head, accumulated in float32 (float64) whatever the type of the factors."""

from __future__ import annotations

from functools import cache

import torch

from .device import on_cpu

HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype_out")
"""From torch 2.8 on a GPU's GEMM can write a wider type than its factors have; before, the factors are widened."""
BAND_BYTES = 64 << 20
"""What a product may take that a GPU's GEMM cannot add to a wider sum itself."""


@cache
def adds_to_wider_sum(factors: torch.dtype, device: torch.device) -> bool:
    """Whether a GPU's GEMM adds to a float32 sum of narrower factors. torch 2.8 and 2.9 refuse it (pytorch PR 167931),
    and so do some builds that call themselves 2.10: it is tried."""
    total = torch.zeros(8, 8, dtype=torch.float32, device=device)
    factor = torch.zeros(8, 8, dtype=factors, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def logits_of(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out = hidden @ weight.T. hidden `[R, C]`, weight `[C, H]`, out `[R, C]` of any type."""
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif out.dtype.itemsize < hidden.dtype.itemsize:  # what a GPU's GEMM does: a wide sum, rounded once
        out.copy_(torch.mm(hidden, weight.t()))
    elif on_cpu(out) or not HAS_OUT_DTYPE:
        torch.mm(hidden.to(out.dtype), weight.t().to(out.dtype), out=out)
    else:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)


def accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, fresh: bool) -> None:
    """total (+)= left @ right; `fresh` overwrites. total may be wider than the factors, or narrower."""
    if left.dtype != right.dtype:
        wide = torch.promote_types(left.dtype, right.dtype)
        left, right = left.to(wide), right.to(wide)
    if total.dtype == left.dtype:
        if fresh:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)
    elif not on_cpu(total) and total.dtype == torch.float32 and HAS_OUT_DTYPE:  # it has no CPU kernel
        if fresh:
            torch.mm(left, right, out_dtype=torch.float32, out=total)
        elif adds_to_wider_sum(left.dtype, left.device):
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
        else:
            band = max(BAND_BYTES // (4 * total.shape[1]), 1)
            for rows, part in zip(total.split(band), left.split(band), strict=True):
                rows.add_(torch.mm(part, right, out_dtype=torch.float32))
    else:
        wide = torch.promote_types(total.dtype, left.dtype)
        product = torch.mm(left.to(wide), right.to(wide))
        if fresh:
            total.copy_(product)
        else:
            total.add_(product)
