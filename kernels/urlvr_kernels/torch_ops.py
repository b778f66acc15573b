"""The two per-logit operations in plain torch: the CPU's backend, and the fallback of every device.

A backend is these two operations; everything else (tiling, GEMMs, tensor parallelism, autograd) is shared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from .call import cut
from .device import on_cpu
from .rowstate import ARGMAX, CENTRED, MAX, SECOND, SPREAD, SUM, TARGET, Incoming, Slopes, Wanted, merge

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
        for band in _bands(logits):
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
        for band in _bands(logits):
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

    def state_and_dlogits(
        self,
        logits: torch.Tensor,
        state: torch.Tensor,
        wanted: Wanted,
        gradient: Incoming,
        *,
        target: torch.Tensor | None,
        first: int,
        whole: bool = False,
    ) -> None:
        """`row_state` (but SECOND and ARGMAX), and dlogits over `logits`, of rows whose logits are all here.

        Done while a band of rows is in the cache, with one exponential. `logits` `[R, C]` are over temperature, in the
        type of `state` `[8, R]`. With d = z - m, log p + entropy = d - CENTRED / SUM: no logarithm is needed.
        """
        room = _Room(state.dtype)
        here, local = (None, None) if target is None else _places(target, first, logits.shape[1], whole)
        if wanted.target:
            assert local is not None
            torch.gather(logits, 1, local, out=state[TARGET].unsqueeze(1))
        size = _band_rows(logits, CPU_JOINED_BAND_BYTES)
        fields = state.unsqueeze(2)  # one column a row, as the logits' bands want it
        cut = (x.split(size) for x in (logits, fields[MAX], fields[SUM], fields[CENTRED], fields[SPREAD]))
        base, tilt, uniform = (_split(x, size) for x in (gradient.base, gradient.tilt, gradient.uniform))
        for i, (z, top, total, centred, spread) in enumerate(zip(*cut, strict=True)):
            torch.amax(z, 1, keepdim=True, out=top)
            d, e = z.sub_(top), room.like(z, 0)
            if wanted.spread:
                torch.sum(d, 1, keepdim=True, out=spread)
            torch.exp(d, out=e)
            torch.sum(e, 1, keepdim=True, out=total)
            if wanted.centred:
                torch.sum(d.mul_(e), 1, keepdim=True, out=centred)
            inverse = total.reciprocal()
            if tilt:
                beta = tilt[i] * inverse
                d.mul_(beta).addcmul_(e, torch.addcmul(base[i], centred, beta, value=-1).mul_(inverse))
            else:
                torch.mul(e, base[i] * inverse, out=d)
            if uniform:
                d.add_(uniform[i])
        if wanted.target:
            state[TARGET].sub_(state[MAX])
            if here is not None:
                state[TARGET].masked_fill_(~here, -math.inf)
        if gradient.label is not None:
            assert local is not None
            _add_label(logits, gradient.label, here, local)

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
    ) -> None:
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
            here, local = _places(target, first, z.shape[1], whole)
            torch.gather(d, 1, local, out=state[TARGET].unsqueeze(1))
            if here is not None:
                state[TARGET].masked_fill_(~here, -math.inf)
        if wanted.spread:
            torch.sum(d, 1, out=state[SPREAD])
        if not wanted.centred and where is None:
            torch.sum(d.exp_(), 1, out=state[SUM])
            return
        e = torch.exp(d, out=room.like(d, 1))
        torch.sum(e, 1, out=state[SUM])
        if wanted.centred:
            if masked:  # -inf * 0 would be NaN; x exp(x) tends to 0
                d.clamp_(min=torch.finfo(d.dtype).min)
            torch.sum(e.mul_(d), 1, out=state[CENTRED])
        if wanted.second:
            assert where is not None
            state[SECOND] = top + d.scatter_(1, where.unsqueeze(1), -math.inf).amax(1)

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
        if slopes.label is not None:
            assert target is not None
            _add_label(dz, slopes.label, *_places(target, first, dz.shape[1], whole))
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


def _band_rows(logits: torch.Tensor, limit: int) -> int:
    """Rows of `logits` that are within `limit` bytes, which a CPU's cache holds; elsewhere all rows at once."""
    rows, columns = logits.shape
    if not on_cpu(logits):
        return max(rows, 1)
    return min(max(rows, 1), max(1, limit // (max(columns, 1) * max(logits.itemsize, 4))))


def _bands(logits: torch.Tensor) -> Iterator[slice]:
    """Slices of rows, one a band."""
    rows, band = logits.shape[0], _band_rows(logits, CPU_BAND_BYTES)
    for start in range(0, rows, band):
        yield slice(start, min(start + band, rows))


def _split(scalars: torch.Tensor | None, size: int) -> tuple[torch.Tensor, ...]:
    """`[R]` -> bands `[r, 1]`; none of nothing."""
    return () if scalars is None else scalars.unsqueeze(1).split(size)


def _scaled(logits: torch.Tensor, dtype: torch.dtype, inv_tau: torch.Tensor | float | None) -> torch.Tensor:
    """Logits over temperature in `dtype`: `logits` itself where nothing changes, else a new tensor."""
    z = logits if logits.dtype == dtype else logits.to(dtype)
    if inv_tau is None:
        return z
    return z * (inv_tau.unsqueeze(1) if isinstance(inv_tau, torch.Tensor) else inv_tau)


def _places(target: torch.Tensor, first: int, columns: int, whole: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
    """`([R] bool: the target is among the columns, [R, 1] int64 its column, clamped into range elsewhere)`.

    None instead of the mask where `whole` promises that every target is.
    """
    local = (target if first == 0 else target - first).to(torch.int64).unsqueeze(1)
    if whole:
        return None, local
    inside = local.clamp(0, columns - 1)
    return (local == inside).squeeze(1), inside


def _add_label(dz: torch.Tensor, label: torch.Tensor, here: torch.Tensor | None, local: torch.Tensor) -> None:
    """Adds each row's `label` `[R]` at its target, at the places that `_places` found."""
    value = label if here is None else label.masked_fill(~here, 0.0)
    dz.scatter_add_(1, local, value.unsqueeze(1))
