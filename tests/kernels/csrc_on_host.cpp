// Runs what each thread of the CUDA kernels does, thread after thread on the host, for the tests of the arithmetic.

#include "row_state.cuh"
#include "slopes.cuh"

using namespace urlvr;

template <typename T>
static void row_state(const T* row, int columns, int splits, int threads, float scale, float* out) {
    RowState total = no_columns();
    const int width = (columns + splits - 1) / splits;
    for (int split = 0; split < splits; ++split) {
        const int begin = smaller(split * width, columns), end = smaller(begin + width, columns);
        for (int thread = 0; thread < threads; ++thread) {
            total = merge<true>(total, read_columns<T, true, true>(row, begin, end, scale, thread, threads));
        }
    }
    const float fields[8] = {total.m, total.s, total.a, total.u, 0.0f, total.n, total.second, static_cast<float>(total.best)};
    for (int i = 0; i < 8; ++i) out[i] = fields[i];
}

template <typename T, typename Out>
static void slopes(const float* s, int local, const T* logits, Out* out, int columns, int block, int threads) {
    const Slopes row{s[0], s[1], s[2], s[3], s[4], s[5], true, local};
    for (int begin = 0; begin < columns; begin += block) {
        for (int thread = 0; thread < threads; ++thread) {
            write_slopes<T, Out>(row, logits, out, begin, smaller(begin + block, columns), thread, threads);
        }
    }
}

extern "C" {

void host_row_state(const void* row, int dtype, int columns, int splits, int threads, float scale, float* out) {
    if (dtype == 0) row_state(static_cast<const float*>(row), columns, splits, threads, scale, out);
    if (dtype == 1) row_state(static_cast<const __nv_bfloat16*>(row), columns, splits, threads, scale, out);
    if (dtype == 2) row_state(static_cast<const __half*>(row), columns, splits, threads, scale, out);
}

// s: scale, lse, alpha, beta, label, uniform
void host_slopes(const float* s, int local, const void* logits, int dtype, void* out, int out_dtype, int columns, int block,
                 int threads) {
    auto f = static_cast<const float*>(logits);
    auto b = static_cast<const __nv_bfloat16*>(logits);
    auto h = static_cast<const __half*>(logits);
    auto bo = static_cast<__nv_bfloat16*>(out);
    if (dtype == 0 && out_dtype == 0) slopes(s, local, f, static_cast<float*>(out), columns, block, threads);
    if (dtype == 0 && out_dtype == 1) slopes(s, local, f, bo, columns, block, threads);
    if (dtype == 1 && out_dtype == 1) slopes(s, local, b, bo, columns, block, threads);
    if (dtype == 2 && out_dtype == 2) slopes(s, local, h, static_cast<__half*>(out), columns, block, threads);
}
}
