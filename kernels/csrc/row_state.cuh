// The mergeable state of a row over part of the vocabulary: the twin of urlvr_kernels/rowstate.py, which explains its fields.
//
// What one thread does is written as functions of its number, callable on the host too: tests run them thread by thread.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "vector.cuh"

namespace urlvr {

enum Field { MAX = 0, SUM, CENTRED, SPREAD, TARGET, COUNT, SECOND, ARGMAX };

struct RowState {
    float m;       // max z
    float s;       // sum exp(z - m)
    float a;       // sum (z - m) exp(z - m)
    float u;       // sum (z - m)
    float n;       // number of columns, exact up to 2^24
    float second;  // second largest z
    int best;      // column of the largest z, the lowest of equals
};

// The state over no columns.
URLVR_FUNCTION RowState no_columns() { return {-INFINITY, 0.0f, 0.0f, 0.0f, 0.0f, -INFINITY, -1}; }

// What a state is shifted by and multiplied by when its maximum becomes `top`; 0 and 0, never NaN, while nothing was seen.
URLVR_FUNCTION float shift_to(float m, float top) { return m == -INFINITY ? 0.0f : m - top; }
URLVR_FUNCTION float weight_of(float m, float shift) { return m == -INFINITY ? 0.0f : exp_of(shift); }

// Takes in N neighbouring columns from `column` on, with one rescale for all of them.
template <int N, bool kCentred, bool kRanked>
URLVR_FUNCTION void absorb(RowState& state, const float (&z)[N], int column) {
    float top = state.m;
    URLVR_UNROLL
    for (int i = 0; i < N; ++i) {
        if (kRanked) {  // a thread sees its columns in ascending order, so a later equal value does not take the lead
            if (z[i] > top) {
                state.second = top;
                state.best = column + i;
            } else {
                state.second = fmaxf(state.second, z[i]);
            }
        }
        top = fmaxf(top, z[i]);
    }
    if (top > state.m) {
        const float shift = shift_to(state.m, top), weight = weight_of(state.m, shift);
        if (kCentred) state.a = weight * (state.a + shift * state.s);
        state.s *= weight;
        state.u += shift * state.n;
        state.m = top;
    }
    const float centre = state.m == -INFINITY ? 0.0f : state.m;
    URLVR_UNROLL
    for (int i = 0; i < N; ++i) {
        const float d = z[i] - centre;
        const float e = exp_of(d);
        state.s += e;
        if (kCentred) state.a = fmaf(e == 0.0f ? 0.0f : d, e, state.a);  // -inf * 0 would be NaN
        state.u += d;
    }
    state.n += N;
}

// The state of the union of two disjoint sets of columns.
template <bool kRanked>
URLVR_FUNCTION RowState merge(const RowState& x, const RowState& y) {
    RowState out = no_columns();
    out.m = fmaxf(x.m, y.m);
    const float dx = shift_to(x.m, out.m), dy = shift_to(y.m, out.m);
    const float wx = weight_of(x.m, dx), wy = weight_of(y.m, dy);
    out.s = wx * x.s + wy * y.s;
    out.a = wx * (x.a + dx * x.s) + wy * (y.a + dy * y.s);
    out.u = (x.u + dx * x.n) + (y.u + dy * y.n);
    out.n = x.n + y.n;
    if (kRanked) {
        out.second = fmaxf(fminf(x.m, y.m), fmaxf(x.second, y.second));
        if (x.best < 0 || y.best < 0) {
            out.best = x.best > y.best ? x.best : y.best;
        } else {
            out.best = x.m > y.m ? x.best : (y.m > x.m ? y.best : smaller(x.best, y.best));
        }
    }
    return out;
}

// The state of the columns [begin, end) that thread `thread` of `threads` reads, 16 bytes at a time between the borders.
template <typename T, bool kCentred, bool kRanked>
URLVR_FUNCTION RowState read_columns(const T* row, int begin, int end, float scale, int thread, int threads) {
    constexpr int N = Vector<T>::kWidth;
    constexpr int kUnroll = 2;  // loads in flight
    RowState state = no_columns();
    const int vectors_at = smaller(begin + elements_to_border(row + begin), end);
    const int vectors = (end - vectors_at) / N;
    for (int c = begin + thread; c < vectors_at; c += threads) {
        const float z[1] = {widen(row[c]) * scale};
        absorb<1, kCentred, kRanked>(state, z, c);
    }
    for (int v = thread; v < vectors; v += kUnroll * threads) {
        Vector<T> loaded[kUnroll];
        URLVR_UNROLL
        for (int k = 0; k < kUnroll; ++k) {
            if (v + k * threads < vectors) loaded[k] = Vector<T>(row + vectors_at + (v + k * threads) * N);
        }
        URLVR_UNROLL
        for (int k = 0; k < kUnroll; ++k) {
            if (v + k * threads < vectors) {
                float z[N];
                URLVR_UNROLL
                for (int i = 0; i < N; ++i) z[i] = widen(loaded[k].values[i]) * scale;
                absorb<N, kCentred, kRanked>(state, z, vectors_at + (v + k * threads) * N);
            }
        }
    }
    for (int c = vectors_at + vectors * N + thread; c < end; c += threads) {
        const float z[1] = {widen(row[c]) * scale};
        absorb<1, kCentred, kRanked>(state, z, c);
    }
    return state;
}

}  // namespace urlvr
