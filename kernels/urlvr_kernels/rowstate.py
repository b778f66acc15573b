"""The mergeable state of a row over part of the vocabulary, and how statistics are read off it.

Over any subset of columns, with `z` the scaled logits, a row is summarised by eight numbers in centred form:

    MAX     m  = max z                      -inf over no columns
    SUM     s  = sum exp(z - m)
    CENTRED a  = sum (z - m) exp(z - m)     entropy = log s - a / s, free of the cancellation in lse - sum p z
    SPREAD  u  = sum (z - m)                self-certainty = log s - u / V - log V
    TARGET  t  = z[target] - m              -inf where the target is not among the columns
    COUNT   n  = number of columns
    SECOND  m2 = second largest z           -inf over fewer than two columns
    ARGMAX  id of the largest z             exact in float32 up to 2**24 entries

Two states of disjoint columns merge into the state of their union, so tiles, chunks, splits and tensor-parallel ranks
all use the one `merge` below. States are `[8, T]`, float32 (float64 for float64 logits). A row of the state that
nobody asked for holds arbitrary bits and is never read.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

MAX, SUM, CENTRED, SPREAD, TARGET, COUNT, SECOND, ARGMAX = range(8)
FIELDS = 8


@dataclass(frozen=True)
class Wanted:
    """Which optional parts of the state are computed. MAX, SUM and COUNT always are."""

    centred: bool = False
    spread: bool = False
    target: bool = False
    second: bool = False
    argmax: bool = False

    @staticmethod
    def of(outputs: Collection[str]) -> Wanted:
        """The parts that the statistics named in `outputs` are made of."""
        return Wanted(
            centred="entropy" in outputs,
            spread="self_certainty" in outputs,
            target="logp" in outputs,
            second="top2_gap" in outputs,
            argmax="argmax" in outputs,
        )


def empty_state(columns: int, rows: int, *, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Room for a state: `[8, rows]`, COUNT filled in; over no columns, the neutral element of `merge`."""
    state = torch.empty(FIELDS, rows, dtype=dtype, device=like.device)
    state[COUNT] = columns
    if columns == 0:
        for field, value in ((MAX, -math.inf), (SUM, 0.0), (CENTRED, 0.0), (SPREAD, 0.0), (TARGET, -math.inf)):
            state[field] = value
        state[SECOND] = -math.inf
        state[ARGMAX] = -1
    return state


def merge(states: torch.Tensor, wanted: Wanted) -> torch.Tensor:
    """Merges states of disjoint columns. states: `[n, 8, T]`; returns `[8, T]`, the union's state (n = 1: a view)."""
    if states.shape[0] == 1:
        return states[0]
    m = states[:, MAX]
    top = m.amax(0)
    out = torch.empty_like(states[0])
    out[MAX] = top
    # A part over no columns has m = -inf: its weight is 0 and its shift must not turn 0 * inf into NaN.
    shift = torch.where(m == -math.inf, 0.0, m - top)
    weight = torch.where(m == -math.inf, 0.0, torch.exp(shift))
    out[SUM] = (weight * states[:, SUM]).sum(0)
    out[COUNT] = states[:, COUNT].sum(0)
    if wanted.centred:
        out[CENTRED] = (weight * (states[:, CENTRED] + shift * states[:, SUM])).sum(0)
    if wanted.spread:
        out[SPREAD] = (states[:, SPREAD] + shift * states[:, COUNT]).sum(0)
    if wanted.target:
        out[TARGET] = (states[:, TARGET] + shift).amax(0)
    if wanted.second:
        pair = torch.cat([m, states[:, SECOND]]).topk(2, dim=0).values
        out[SECOND] = pair[1]
    if wanted.argmax:
        ids = torch.where(m == top, states[:, ARGMAX], math.inf).amin(0)
        out[ARGMAX] = torch.where(ids == math.inf, -1.0, ids)  # no part equals a NaN maximum
    return out


def statistics(
    state: torch.Tensor, outputs: Collection[str], vocab_size: int | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Reads statistics off the state of the whole vocabulary.

    state: `[8, T]`; vocab_size: number of real entries (a tensor where only the merged COUNT knows it).
    Returns `(lse, entropy or an empty tensor, {name: [T]})`; the first two are what the backward needs.
    """
    log_s = state[SUM].log()
    lse = state[MAX] + log_s
    found: dict[str, torch.Tensor] = {}
    entropy = log_s.new_empty(0)
    if "entropy" in outputs:
        entropy = found["entropy"] = log_s - state[CENTRED] / state[SUM]
    if "logp" in outputs:
        found["logp"] = state[TARGET] - log_s
    if "self_certainty" in outputs:
        log_v = vocab_size.log() if isinstance(vocab_size, torch.Tensor) else math.log(vocab_size)
        found["self_certainty"] = log_s - state[SPREAD] / vocab_size - log_v
    if "lse" in outputs:
        found["lse"] = lse
    if "top2_gap" in outputs:
        found["top2_gap"] = (1.0 - torch.exp(state[SECOND] - state[MAX])) / state[SUM]
    if "max_prob" in outputs:
        found["max_prob"] = 1.0 / state[SUM]
    if "argmax" in outputs:
        found["argmax"] = state[ARGMAX].to(torch.int64)
    return lse, entropy, found


@dataclass(frozen=True)
class Slopes:
    """Per-row scalars of the gradient with respect to the scaled logits, `[T]` each, None where zero everywhere.

    With `p = exp(z - lse)`:  dz = p * (alpha + beta * (z - lse)) + label * [column = target] + uniform.
    """

    lse: torch.Tensor
    alpha: torch.Tensor
    beta: torch.Tensor | None
    label: torch.Tensor | None
    uniform: torch.Tensor | None

    def rows(self, index: slice) -> Slopes:
        """The slopes of some rows."""
        if index.start == 0 and index.stop == self.lse.shape[0]:
            return self
        scalars = (self.beta, self.label, self.uniform)
        return Slopes(self.lse[index], self.alpha[index], *(_cut(scalar, index) for scalar in scalars))


@dataclass(frozen=True)
class Incoming:
    """Per-row scalars of the gradients that reach the statistics, before a row's logits are known; `[T]` each.

    With `q = log p`:  dz = p * (base + tilt * (q + entropy)) + label * [column = target] + uniform, from
    d logp = [column = target] - p, d entropy = -p (q + entropy), d self_certainty = p - 1/V, d lse = p.
    """

    base: torch.Tensor
    tilt: torch.Tensor | None
    label: torch.Tensor | None
    uniform: torch.Tensor | None

    def rows(self, index: slice) -> Incoming:
        """The scalars of some rows."""
        return Incoming(self.base[index], *(_cut(x, index) for x in (self.tilt, self.label, self.uniform)))

    def slopes(self, lse: torch.Tensor, entropy: torch.Tensor) -> Slopes:
        """The slopes of rows with this log-sum-exp and entropy."""
        alpha = self.base if self.tilt is None else self.base + self.tilt * entropy
        return Slopes(lse, alpha, self.tilt, self.label, self.uniform)


def incoming(grads: dict[str, torch.Tensor], vocab_size: int | torch.Tensor, dtype: torch.dtype) -> Incoming:
    """`Incoming` of the gradients of the statistics, `{name: [T]}`: only names with a gradient, at least one."""
    wide = {name: gradient.to(dtype) for name, gradient in grads.items()}
    base = torch.zeros_like(next(iter(wide.values())))
    for name, sign in (("logp", -1.0), ("self_certainty", 1.0), ("lse", 1.0)):
        if name in wide:
            base.add_(wide[name], alpha=sign)
    return Incoming(
        base,
        tilt=-wide["entropy"] if "entropy" in wide else None,
        label=wide.get("logp"),
        uniform=-wide["self_certainty"] / vocab_size if "self_certainty" in wide else None,
    )


def _cut(value: torch.Tensor | None, index: slice) -> torch.Tensor | None:
    return None if value is None else value[index]
