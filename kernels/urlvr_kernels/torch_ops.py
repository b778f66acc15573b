"""The two per-logit operations in plain torch: the CPU's backend, and the fallback of every device.

A backend is these two operations; everything else (tiling, GEMMs, tensor parallelism, autograd) is shared.
"""

from __future__ import annotations

import math

import torch

from .rowstate import ARGMAX, CENTRED, MAX, SECOND, SPREAD, SUM, TARGET, Slopes, Wanted, merge


class TorchOps:
    """Plain torch, any device and dtype. Works in tiles that its caller keeps small enough for the cache."""

    name = "torch"
    fused = False

    def row_state(
        self,
        logits: torch.Tensor,
        state: torch.Tensor,
        wanted: Wanted,
        *,
        target: torch.Tensor | None,
        first: int,
        inv_tau: torch.Tensor | float | None,
        whole: bool = False,
        consume: bool = False,
        masked: bool = False,
    ) -> None:
        """Writes the state of `logits` `[R, C]` into `state` `[8, R]`, whose COUNT is set already.

        target: `[R]` global ids, or None; first: global id of column 0; inv_tau: `[R]`, a number, or None for 1;
        whole: every target is among the columns; consume: `logits` may be overwritten; masked: logits may be -inf
        (grammar masks).
        """
        z = _scaled(logits, state.dtype, inv_tau)
        where = None
        if wanted.argmax or wanted.second:
            top, where = z.max(1)
            state[MAX] = top
            state[ARGMAX] = where + first
        else:
            top = torch.amax(z, 1, out=state[MAX])
        # A tile of nothing but -inf still needs a finite number to be centred on.
        centre = (top.clamp(min=torch.finfo(top.dtype).min) if masked else top).unsqueeze(1)
        d = z.sub_(centre) if consume or z is not logits else z - centre
        if wanted.target:
            assert target is not None
            if whole:
                torch.gather(d, 1, _columns(target, first), out=state[TARGET].unsqueeze(1))
            else:
                here, local = _here(target, first, z.shape[1])
                torch.where(here, d.gather(1, local).squeeze(1), _scalar(-math.inf, d), out=state[TARGET])
        if wanted.spread:
            torch.sum(d, 1, out=state[SPREAD])
        if not wanted.centred and where is None:
            torch.sum(d.exp_(), 1, out=state[SUM])
            return
        e = d.exp()
        torch.sum(e, 1, out=state[SUM])
        if wanted.centred:
            if masked:  # -inf * 0 would be NaN; x exp(x) tends to 0
                d.clamp_(min=torch.finfo(d.dtype).min)
            torch.sum(e.mul_(d), 1, out=state[CENTRED])
        if wanted.second:
            assert where is not None
            state[SECOND] = top + d.scatter_(1, where.unsqueeze(1), -math.inf).amax(1)

    def dlogits(
        self,
        logits: torch.Tensor,
        out: torch.Tensor,
        slopes: Slopes,
        *,
        target: torch.Tensor | None,
        first: int,
        inv_tau: torch.Tensor | float | None,
        whole: bool = False,
        masked: bool = False,
    ) -> None:
        """Writes the gradient with respect to the unscaled `logits` `[R, C]` into `out`, which may be `logits`.

        The label is subtracted in the state's precision, before any rounding to `out`'s: of a confident token's rounded
        probability nothing would be left after the subtraction.
        """
        lse = slopes.lse.unsqueeze(1)
        z = _scaled(logits, lse.dtype, inv_tau)
        if z is not logits or out is logits:
            q = z.sub_(lse)
        else:
            q = torch.sub(z, lse, out=out) if out.dtype == lse.dtype else z - lse
        if slopes.beta is None:
            dz = q.exp_().mul_(slopes.alpha.unsqueeze(1))
        else:
            p = q.exp()
            if masked:
                q.clamp_(min=torch.finfo(q.dtype).min / 1024)
            dz = q.mul_(slopes.beta.unsqueeze(1)).add_(slopes.alpha.unsqueeze(1)).mul_(p)
        if slopes.label is not None:
            assert target is not None
            if whole:
                dz.scatter_add_(1, _columns(target, first), slopes.label.unsqueeze(1))
            else:
                here, local = _here(target, first, dz.shape[1])
                dz.scatter_add_(1, local, torch.where(here, slopes.label, _scalar(0.0, dz)).unsqueeze(1))
        if slopes.uniform is not None:
            dz.add_(slopes.uniform.unsqueeze(1))
        if inv_tau is not None:
            dz.mul_(inv_tau.unsqueeze(1) if isinstance(inv_tau, torch.Tensor) else inv_tau)
        if dz is not out:
            out.copy_(dz)

    def merge(self, states: torch.Tensor, wanted: Wanted) -> torch.Tensor:
        """See `rowstate.merge`."""
        return merge(states, wanted)


def _scalar(value: float, like: torch.Tensor) -> torch.Tensor:
    """A zero-dimensional constant made on the device of `like`, without a copy from the host."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _scaled(logits: torch.Tensor, dtype: torch.dtype, inv_tau: torch.Tensor | float | None) -> torch.Tensor:
    """Logits over temperature in `dtype`: `logits` itself where nothing changes, else a new tensor."""
    z = logits if logits.dtype == dtype else logits.to(dtype)
    if inv_tau is None:
        return z
    return z * (inv_tau.unsqueeze(1) if isinstance(inv_tau, torch.Tensor) else inv_tau)


def _columns(target: torch.Tensor, first: int) -> torch.Tensor:
    """`[R, 1]` int64 column of each target."""
    local = target if first == 0 else target - first
    return local.to(torch.int64).unsqueeze(1)


def _here(target: torch.Tensor, first: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`([R] bool: the target is among the columns, [R, 1] its column, clamped into range elsewhere)`."""
    local = _columns(target, first)
    inside = local.clamp(0, columns - 1)
    return (local == inside).squeeze(1), inside
