"""Triton kernels: one-read statistics, dlogits in place, merging of states. The only file with `@triton.jit` in it.

Every value is widened to float32 on load, so that the interpreter (which holds bfloat16 as bits and would compute
garbage on it) and the compiler do the same arithmetic. Rows are on grid axis 0, whose limit is 2**31; offsets are
64-bit. Block sizes are fixed: nothing is tuned at run time, nothing depends on the order of programs, and nothing is
atomic. Columns are counted in 32 bits: a shard has fewer than 2**31.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _absorb(
    here,
    column,
    end,
    scale,
    m,
    s,
    a,
    u,
    seen,
    second,
    best,
    WITH_CENTRED: tl.constexpr,
    WITH_SPREAD: tl.constexpr,
    RANKED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Takes one block of columns into the running state. Unmasked blocks are what makes 16-byte loads possible."""
    if MASKED:
        z = tl.load(here + column, mask=column < end, other=NEGATIVE_INFINITY).to(tl.float32) * scale
    else:
        z = tl.load(here + column).to(tl.float32) * scale
    top = tl.max(z, 0)
    if RANKED:
        where = tl.min(tl.where(z == top, column, end), 0)  # the first of equal maxima
        runner_up = tl.max(tl.where(column == where, NEGATIVE_INFINITY, z), 0)
        second = tl.maximum(tl.minimum(m, top), tl.maximum(second, runner_up))
        best = tl.where(top > m, where, best)
    m_new = tl.maximum(m, top)
    centre = tl.where(m_new == NEGATIVE_INFINITY, 0.0, m_new)
    shift = tl.where(m == NEGATIVE_INFINITY, 0.0, m - centre)
    weight = tl.where(m == NEGATIVE_INFINITY, 0.0, tl.exp(shift))
    d = z - centre
    e = tl.exp(d)
    if WITH_CENTRED:
        a = weight * (a + shift * s) + tl.sum(tl.where(e == 0.0, 0.0, d * e), 0)
    if WITH_SPREAD:
        if MASKED:
            u = u + shift * seen + tl.sum(tl.where(column < end, d, 0.0), 0)
        else:
            u = u + shift * seen + tl.sum(d, 0)
            seen += BLOCK
    s = weight * s + tl.sum(e, 0)
    return m_new, s, a, u, seen, second, best


@triton.jit
def row_state_kernel(
    logits,
    stride,
    state,
    field_stride,
    split_stride,
    target,
    inv_tau,
    tau_number,
    first,
    columns,
    split_columns,
    WITH_CENTRED: tl.constexpr,
    WITH_SPREAD: tl.constexpr,
    WITH_TARGET: tl.constexpr,
    RANKED: tl.constexpr,
    TAU_PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """State of one row over one split of the columns; grid (rows, splits). See `rowstate` for the eight fields.

    split_columns is a multiple of BLOCK; RANKED fills SECOND and ARGMAX.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, columns)
    here = logits + row * stride
    scale = tl.load(inv_tau + row) if TAU_PER_ROW else tau_number
    lane = tl.arange(0, BLOCK)

    m = NEGATIVE_INFINITY
    second = NEGATIVE_INFINITY
    s = 0.0
    a = 0.0
    u = 0.0
    seen = 0.0
    best = begin
    whole = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, whole, BLOCK):
        m, s, a, u, seen, second, best = _absorb(
            here, start + lane, end, scale, m, s, a, u, seen, second, best,
            WITH_CENTRED, WITH_SPREAD, RANKED, False, BLOCK,
        )  # fmt: skip
    if whole < end:
        m, s, a, u, seen, second, best = _absorb(
            here, whole + lane, end, scale, m, s, a, u, seen, second, best,
            WITH_CENTRED, WITH_SPREAD, RANKED, True, BLOCK,
        )  # fmt: skip

    out = state + split.to(tl.int64) * split_stride + row
    tl.store(out, m)
    tl.store(out + field_stride, s)
    if WITH_CENTRED:
        tl.store(out + 2 * field_stride, a)
    if WITH_SPREAD:
        tl.store(out + 3 * field_stride, u)
    if WITH_TARGET:
        local = (tl.load(target + row) - first).to(tl.int32)
        found = (local >= begin) & (local < end)
        t = tl.load(here + local, mask=found, other=0.0).to(tl.float32) * scale
        centre = tl.where(m == NEGATIVE_INFINITY, 0.0, m)
        tl.store(out + 4 * field_stride, tl.where(found, t - centre, NEGATIVE_INFINITY))
    tl.store(out + 5 * field_stride, (end - begin).to(tl.float32))
    if RANKED:
        tl.store(out + 6 * field_stride, second)
        tl.store(out + 7 * field_stride, (best + first).to(tl.float32))


@triton.jit
def _slope_block(
    logits,
    out,
    column,
    columns,
    scale,
    lse,
    alpha,
    beta,
    label,
    local,
    uniform,
    WITH_BETA: tl.constexpr,
    WITH_LABEL: tl.constexpr,
    WITH_UNIFORM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dlogits of one block of one row."""
    if MASKED:
        z = tl.load(logits + column, mask=column < columns, other=NEGATIVE_INFINITY).to(tl.float32) * scale
    else:
        z = tl.load(logits + column).to(tl.float32) * scale
    q = z - lse
    p = tl.exp(q)
    if WITH_BETA:
        dz = tl.where(p == 0.0, 0.0, p * (alpha + beta * q))
    else:
        dz = p * alpha
    if WITH_LABEL:  # in float32, before the rounding of the store
        dz += tl.where(column == local, label, 0.0)
    if WITH_UNIFORM:
        dz += uniform
    dx = (dz * scale).to(out.dtype.element_ty)
    if MASKED:
        tl.store(out + column, dx, mask=column < columns)
    else:
        tl.store(out + column, dx)


@triton.jit
def dlogits_kernel(
    logits,
    stride,
    out,
    out_stride,
    target,
    inv_tau,
    tau_number,
    lse,
    alpha,
    beta,
    label,
    uniform,
    first,
    columns,
    WITH_BETA: tl.constexpr,
    WITH_LABEL: tl.constexpr,
    WITH_UNIFORM: tl.constexpr,
    TAU_PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of the logits of one row and one block of columns; grid (rows, blocks). `out` may be `logits`."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)
    scale = tl.load(inv_tau + row) if TAU_PER_ROW else tau_number
    beta_row = tl.load(beta + row) if WITH_BETA else 0.0
    label_row = tl.load(label + row) if WITH_LABEL else 0.0
    uniform_row = tl.load(uniform + row) if WITH_UNIFORM else 0.0
    local = (tl.load(target + row) - first).to(tl.int32) if WITH_LABEL else -1
    source = logits + row * stride
    place = out + row * out_stride
    lse_row = tl.load(lse + row)
    alpha_row = tl.load(alpha + row)
    if start + BLOCK <= columns:
        _slope_block(
            source, place, column, columns, scale, lse_row, alpha_row, beta_row, label_row, local, uniform_row,
            WITH_BETA, WITH_LABEL, WITH_UNIFORM, False,
        )  # fmt: skip
    else:
        _slope_block(
            source, place, column, columns, scale, lse_row, alpha_row, beta_row, label_row, local, uniform_row,
            WITH_BETA, WITH_LABEL, WITH_UNIFORM, True,
        )  # fmt: skip


@triton.jit
def merge_kernel(
    states,
    state_stride,
    field_stride,
    out,
    out_field_stride,
    count,
    rows,
    WITH_CENTRED: tl.constexpr,
    WITH_SPREAD: tl.constexpr,
    WITH_TARGET: tl.constexpr,
    RANKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merges `count` states of disjoint columns, in their order; grid (blocks of rows,). Of equal maxima the lowest
    id."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    m = tl.full((BLOCK,), NEGATIVE_INFINITY, tl.float32)
    second = tl.full((BLOCK,), NEGATIVE_INFINITY, tl.float32)
    t = tl.full((BLOCK,), NEGATIVE_INFINITY, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    a = tl.zeros((BLOCK,), tl.float32)
    u = tl.zeros((BLOCK,), tl.float32)
    n = tl.zeros((BLOCK,), tl.float32)
    best = tl.full((BLOCK,), -1.0, tl.float32)
    for i in range(count):
        part = states + tl.cast(i, tl.int64) * state_stride + row
        m_i = tl.load(part, mask=inside, other=NEGATIVE_INFINITY)
        s_i = tl.load(part + field_stride, mask=inside, other=0.0)
        top = tl.maximum(m, m_i)
        old_shift = tl.where(m == NEGATIVE_INFINITY, 0.0, m - top)
        new_shift = tl.where(m_i == NEGATIVE_INFINITY, 0.0, m_i - top)
        old = tl.where(m == NEGATIVE_INFINITY, 0.0, tl.exp(old_shift))
        new = tl.where(m_i == NEGATIVE_INFINITY, 0.0, tl.exp(new_shift))
        if WITH_CENTRED:
            a_i = tl.load(part + 2 * field_stride, mask=inside, other=0.0)
            a = old * (a + old_shift * s) + new * (a_i + new_shift * s_i)
        if WITH_SPREAD:
            u_i = tl.load(part + 3 * field_stride, mask=inside, other=0.0)
            n_i = tl.load(part + 5 * field_stride, mask=inside, other=0.0)
            u = (u + old_shift * n) + (u_i + new_shift * n_i)
            n += n_i
        if WITH_TARGET:
            t_i = tl.load(part + 4 * field_stride, mask=inside, other=NEGATIVE_INFINITY)
            t = tl.maximum(t + old_shift, t_i + new_shift)
        if RANKED:
            second_i = tl.load(part + 6 * field_stride, mask=inside, other=NEGATIVE_INFINITY)
            second = tl.maximum(tl.minimum(m, m_i), tl.maximum(second, second_i))
            best_i = tl.load(part + 7 * field_stride, mask=inside, other=-1.0)
            tied = tl.where((m_i == m) & (best >= 0), tl.minimum(best, best_i), best)
            best = tl.where(m_i > m, best_i, tied)
        s = old * s + new * s_i
        m = top
    place = out + row
    tl.store(place, m, mask=inside)
    tl.store(place + out_field_stride, s, mask=inside)
    if WITH_CENTRED:
        tl.store(place + 2 * out_field_stride, a, mask=inside)
    if WITH_SPREAD:
        tl.store(place + 3 * out_field_stride, u, mask=inside)
        tl.store(place + 5 * out_field_stride, n, mask=inside)
    if WITH_TARGET:
        tl.store(place + 4 * out_field_stride, t, mask=inside)
    if RANKED:
        tl.store(place + 6 * out_field_stride, second, mask=inside)
        tl.store(place + 7 * out_field_stride, best, mask=inside)
