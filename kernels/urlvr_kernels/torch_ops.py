"""The two per-logit operations in plain torch: the CPU's backend, and the fallback of every device.

A backend is these two operations; everything else (tiling, GEMMs, tensor parallelism, autograd) is shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from .call import cut
from .device import on_cpu
from .rowstate import ARGMAX, CENTRED, MAX, SECOND, SPREAD, SUM, TARGET, Slopes, Wanted, merge

CPU_BAND_BYTES = 1 << 20
"""Logits that one sequence of elementwise operations goes through: they and their exponentials stay in a core's L2
cache (2 MB on current servers)."""
CPU_JOINED_BAND_BYTES = CPU_BAND_BYTES // 2
"""The same where state and gradient are made in one go, which reads both more often."""


class TorchOps:
    """Plain torch, any device and dtype. On a CPU it goes through a tile in bands of rows."""

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
        room = _Room(state.dtype)
        for band in _bands(logits, CPU_BAND_BYTES):
            self._row_state(
                logits[band],
                state[:, band],
                wanted,
                target=None if target is None else target[band],
                first=first,
                inv_tau=cut(inv_tau, band),
                whole=whole,
                consume=consume,
                masked=masked,
                room=room,
            )

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
        room = _Room(slopes.lse.dtype)
        for band in _bands(logits, CPU_BAND_BYTES):
            self._dlogits(
                logits[band],
                out[band],
                slopes.rows(band),
                target=None if target is None else target[band],
                first=first,
                inv_tau=cut(inv_tau, band),
                whole=whole,
                masked=masked,
                room=room,
            )

    def row_state_and_dlogits(
        self,
        logits: torch.Tensor,
        out: torch.Tensor,
        state: torch.Tensor,
        wanted: Wanted,
        slopes_of: Callable[[torch.Tensor, slice], Slopes],
        *,
        target: torch.Tensor | None,
        first: int,
        inv_tau: torch.Tensor | float | None,
        whole: bool = False,
    ) -> None:
        """`row_state` and `dlogits` of rows whose logits are all here, while a band of them is in the cache.

        Each exponential is used for both. `logits` is overwritten, and may be `out`. `slopes_of(state, rows)` gives the
        slopes of some rows from their state `[8, r]`.
        """
        room = _Room(state.dtype)
        for band in _bands(logits, CPU_JOINED_BAND_BYTES):
            local = None if target is None else target[band]
            scale = cut(inv_tau, band)
            d, e = self._row_state(
                logits[band],
                state[:, band],
                wanted,
                target=local,
                first=first,
                inv_tau=scale,
                whole=whole,
                consume=True,
                masked=False,
                room=room,
                keep=True,
            )
            slopes, total = slopes_of(state[:, band], band), state[SUM, band].unsqueeze(1)
            alpha = slopes.alpha.unsqueeze(1)
            if slopes.beta is None:
                dz = torch.mul(e, alpha / total, out=out[band] if out.dtype == e.dtype else e)
            else:  # z - lse = d - log total
                beta = slopes.beta.unsqueeze(1)
                dz = d.mul_(beta / total).add_((alpha - beta * total.log()) / total).mul_(e)
            self._finish(dz, out[band], slopes, target=local, first=first, inv_tau=scale, whole=whole)

    def _row_state(
        self,
        logits: torch.Tensor,
        state: torch.Tensor,
        wanted: Wanted,
        *,
        target: torch.Tensor | None,
        first: int,
        inv_tau: torch.Tensor | float | None,
        whole: bool,
        consume: bool,
        masked: bool,
        room: _Room,
        keep: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a band's state. `keep`: returns z - m and its exponential; else what is returned means nothing."""
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
        d = z.sub_(centre) if consume or z is not logits else torch.sub(z, centre, out=room.like(z, 0))
        if wanted.target:
            assert target is not None
            if whole:
                torch.gather(d, 1, _columns(target, first), out=state[TARGET].unsqueeze(1))
            else:
                here, local = _here(target, first, z.shape[1])
                torch.where(here, d.gather(1, local).squeeze(1), _scalar(-math.inf, d), out=state[TARGET])
        if wanted.spread:
            torch.sum(d, 1, out=state[SPREAD])
        if not keep and not wanted.centred and where is None:
            torch.sum(d.exp_(), 1, out=state[SUM])
            return d, d
        e = torch.exp(d, out=room.like(d, 1))
        torch.sum(e, 1, out=state[SUM])
        if wanted.centred:
            if masked:  # -inf * 0 would be NaN; x exp(x) tends to 0
                d.clamp_(min=torch.finfo(d.dtype).min)
            product = torch.mul(e, d, out=room.like(d, 2)) if keep else e.mul_(d)
            torch.sum(product, 1, out=state[CENTRED])
        if wanted.second:
            assert where is not None
            others = d.clone() if keep else d
            state[SECOND] = top + others.scatter_(1, where.unsqueeze(1), -math.inf).amax(1)
        return d, e

    def _dlogits(
        self,
        logits: torch.Tensor,
        out: torch.Tensor,
        slopes: Slopes,
        *,
        target: torch.Tensor | None,
        first: int,
        inv_tau: torch.Tensor | float | None,
        whole: bool,
        masked: bool,
        room: _Room,
    ) -> None:
        lse = slopes.lse.unsqueeze(1)
        z = _scaled(logits, lse.dtype, inv_tau)
        if z is not logits or out is logits:
            q = z.sub_(lse)
        else:
            q = torch.sub(z, lse, out=out if out.dtype == lse.dtype else room.like(z, 0))
        if slopes.beta is None:
            dz = q.exp_().mul_(slopes.alpha.unsqueeze(1))
        else:
            p = torch.exp(q, out=room.like(q, 1))
            if masked:
                q.clamp_(min=torch.finfo(q.dtype).min / 1024)
            dz = q.mul_(slopes.beta.unsqueeze(1)).add_(slopes.alpha.unsqueeze(1)).mul_(p)
        self._finish(dz, out, slopes, target=target, first=first, inv_tau=inv_tau, whole=whole)

    @staticmethod
    def _finish(
        dz: torch.Tensor,
        out: torch.Tensor,
        slopes: Slopes,
        *,
        target: torch.Tensor | None,
        first: int,
        inv_tau: torch.Tensor | float | None,
        whole: bool,
    ) -> None:
        """The label, the uniform part and the temperature: from `dz` into `out`."""
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


class _Room:
    """Buffers that all bands of a tile use in turn: fresh memory for each would cost more than the arithmetic."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._flat: dict[int, torch.Tensor] = {}

    def like(self, band: torch.Tensor, which: int) -> torch.Tensor:
        """Buffer number `which` in the shape of `band`, the first of which is the largest."""
        if which not in self._flat:
            self._flat[which] = band.new_empty(band.numel(), dtype=self._dtype)
        return self._flat[which][: band.numel()].view(band.shape)


def _bands(logits: torch.Tensor, limit: int) -> Iterator[slice]:
    """Slices of rows within `limit` bytes, which a CPU's cache holds; elsewhere all rows at once."""
    rows, columns = logits.shape
    band = rows
    if on_cpu(logits):
        band = min(rows, max(1, limit // (max(columns, 1) * max(logits.itemsize, 4))))
    for start in range(0, rows, max(band, 1)):
        yield slice(start, min(start + band, rows))


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
