"""The matrix products of a vocabulary head, accumulated in float32 (float64) whatever the type of the factors."""

from __future__ import annotations

import torch


def logits_of(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out = hidden @ weight.T. hidden `[R, C]`, weight `[C, H]`, out `[R, C]` of any type."""
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif out.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:  # what a GPU's GEMM does: a wide sum, rounded once
        out.copy_(torch.mm(hidden, weight.t()))


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
    elif total.is_cuda and total.dtype == torch.float32:  # `out_dtype` has no CPU kernel
        if fresh:
            torch.mm(left, right, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        wide = torch.promote_types(total.dtype, left.dtype)
        product = torch.mm(left.to(wide), right.to(wide))
        if fresh:
            total.copy_(product)
        else:
            total.add_(product)
