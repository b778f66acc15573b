// The gradient of logits from per-row scalars: the twin of `Slopes` in urlvr_kernels/rowstate.py.
#pragma once

#include "vector.cuh"

namespace urlvr {

// One row's scalars. beta, label and uniform are 0 where there are none; local is the target's column, or outside the tile.
struct Slopes {
    float scale, lse, alpha, beta, label, uniform;
    bool with_beta;
    int64_t local;
};

template <typename Out>
URLVR_FUNCTION Out slope(const Slopes& row, float x, int column) {
    const float q = x * row.scale - row.lse;
    const float p = exp_of(q);
    float dz = p * row.alpha;
    if (row.with_beta) dz = p == 0.0f ? 0.0f : p * (row.beta * q + row.alpha);
    if (column == row.local) dz += row.label;  // in float32, before the rounding
    Out out;
    narrow((dz + row.uniform) * row.scale, out);
    return out;
}

// Writes the columns [begin, end) that thread `thread` of `threads` is given. `out` may be `logits` where the types agree.
template <typename T, typename Out>
URLVR_FUNCTION void write_slopes(const Slopes& row, const T* logits, Out* out, int begin, int end, int thread, int threads) {
    constexpr int N = Vector<T>::kWidth;
    const int border = elements_to_border(logits + begin);
    const bool together = sizeof(T) == sizeof(Out) && elements_to_border(out + begin) == border;
    const int vectors_at = together ? smaller(begin + border, end) : end;
    const int vectors = (end - vectors_at) / N;
    for (int c = begin + thread; c < vectors_at; c += threads) out[c] = slope<Out>(row, widen(logits[c]), c);
    if constexpr (sizeof(T) == sizeof(Out)) {
        for (int v = thread; v < vectors; v += threads) {
            const int c = vectors_at + v * N;
            const Vector<T> loaded(logits + c);
            Vector<Out> result;
            URLVR_UNROLL
            for (int i = 0; i < N; ++i) result.values[i] = slope<Out>(row, widen(loaded.values[i]), c + i);
            result.store(out + c);
        }
    }
    for (int c = vectors_at + vectors * N + thread; c < end; c += threads) out[c] = slope<Out>(row, widen(logits[c]), c);
}

}  // namespace urlvr
