// One-read statistics of logits, dlogits, and merging of states. Plain C entry points: nothing here knows PyTorch, so that one
// build serves every PyTorch (and Python) on the machine; urlvr_kernels/cuda_ops.py calls it through ctypes.
//
// A row is read once, by one block, or (few rows) by up to eight: a thread-block cluster that merges through distributed
// shared memory on sm_90, separate blocks whose states a second kernel merges elsewhere. No atomics: every sum has one order.

#include <cooperative_groups.h>

#include <algorithm>
#include <cstdint>

#include "row_state.cuh"
#include "slopes.cuh"

namespace urlvr {

constexpr int kAbiVersion = 1;
constexpr int kMaxWarps = 16;
constexpr int kSlopeThreads = 256;
constexpr int kSlopeBytes = 32;  // read by a thread

enum Flag { WITH_CENTRED = 1, RANKED = 2, WITH_TARGET = 4, TARGET_64 = 8, WITH_BETA = 16, WITH_LABEL = 32, WITH_UNIFORM = 64 };

struct RowStateArgs {
    const void* logits;
    int64_t stride;
    int columns, split_columns, first, flags;
    float* state;
    int64_t field_stride, split_stride;
    const void* target;
    const float* inv_tau;
    float tau_number;
};

struct SlopeArgs {
    const void* logits;
    void* out;
    int64_t stride, out_stride;
    int columns, first, flags;
    const void* target;
    const float *inv_tau, *lse, *alpha, *beta, *label, *uniform;
    float tau_number;
};

// The row's target as a column of this tile; anything outside [0, columns) is not here.
__device__ __forceinline__ int64_t local_target(const void* target, int64_t row, int flags, int first) {
    const int64_t id = (flags & TARGET_64) ? static_cast<const int64_t*>(target)[row]
                                           : static_cast<int64_t>(static_cast<const int32_t*>(target)[row]);
    return id - first;
}

template <bool kRanked>
__device__ __forceinline__ RowState shuffle_down(const RowState& state, int distance) {
    constexpr unsigned kAll = 0xffffffffu;
    RowState out = no_columns();
    out.m = __shfl_down_sync(kAll, state.m, distance);
    out.s = __shfl_down_sync(kAll, state.s, distance);
    out.a = __shfl_down_sync(kAll, state.a, distance);
    out.u = __shfl_down_sync(kAll, state.u, distance);
    out.n = __shfl_down_sync(kAll, state.n, distance);
    if (kRanked) {
        out.second = __shfl_down_sync(kAll, state.second, distance);
        out.best = __shfl_down_sync(kAll, state.best, distance);
    }
    return out;
}

// Lane 0 ends with the merge of all lanes, in a fixed order.
template <bool kRanked>
__device__ __forceinline__ RowState reduce_warp(RowState state) {
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1) {
        state = merge<kRanked>(state, shuffle_down<kRanked>(state, distance));
    }
    return state;
}

template <bool kRanked>
__device__ RowState reduce_block(RowState state, RowState* shared) {
    state = reduce_warp<kRanked>(state);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if (lane == 0) shared[warp] = state;
    __syncthreads();
    if (warp == 0) {
        state = lane < warps ? shared[lane] : no_columns();
        state = reduce_warp<kRanked>(state);
    }
    return state;  // of thread 0
}

template <typename T, bool kCentred, bool kRanked>
__device__ void write_state(const RowStateArgs& args, const RowState& state, int64_t row, int split, int begin, int end,
                            const T* here, float scale) {
    float* out = args.state + split * args.split_stride + row;
    out[MAX * args.field_stride] = state.m;
    out[SUM * args.field_stride] = state.s;
    if (kCentred) out[CENTRED * args.field_stride] = state.a;
    out[SPREAD * args.field_stride] = state.u;
    out[COUNT * args.field_stride] = state.n;
    if (args.flags & WITH_TARGET) {
        const int64_t local = local_target(args.target, row, args.flags, args.first);
        const float centre = state.m == -INFINITY ? 0.0f : state.m;
        const bool found = local >= begin && local < end;
        out[TARGET * args.field_stride] = found ? widen(here[local]) * scale - centre : -INFINITY;
    }
    if (kRanked) {
        out[SECOND * args.field_stride] = state.second;
        out[ARGMAX * args.field_stride] = static_cast<float>(state.best + args.first);
    }
}

// Grid (rows, splits). With kCluster the splits of a row are one cluster and leave one state, else one state each.
template <typename T, bool kCentred, bool kRanked, bool kCluster>
__global__ void __launch_bounds__(32 * kMaxWarps) row_state_kernel(const RowStateArgs args) {
    __shared__ RowState shared[kMaxWarps];
    const int64_t row = blockIdx.x;
    const int begin = blockIdx.y * args.split_columns;
    const int end = min(begin + args.split_columns, args.columns);
    const T* here = static_cast<const T*>(args.logits) + row * args.stride;
    const float scale = args.inv_tau ? args.inv_tau[row] : args.tau_number;
    RowState state = reduce_block<kRanked>(read_columns<T, kCentred, kRanked>(here, begin, end, scale, threadIdx.x, blockDim.x), shared);
    if constexpr (!kCluster) {
        if (threadIdx.x == 0) write_state<T, kCentred, kRanked>(args, state, row, blockIdx.y, begin, end, here, scale);
    } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        auto cluster = cooperative_groups::this_cluster();
        __syncthreads();  // warp 0 has read `shared`
        if (threadIdx.x == 0) shared[0] = state;
        cluster.sync();
        if (cluster.block_rank() == 0 && threadIdx.x == 0) {
            for (unsigned other = 1; other < cluster.num_blocks(); ++other) {
                state = merge<kRanked>(state, *cluster.map_shared_rank(&shared[0], other));
            }
            write_state<T, kCentred, kRanked>(args, state, row, 0, 0, args.columns, here, scale);
        }
        cluster.sync();  // a block's shared memory lives until it has been read
#endif
    }
}

// Grid (rows, blocks of columns).
template <typename T, typename Out>
__global__ void __launch_bounds__(kSlopeThreads) dlogits_kernel(const SlopeArgs args) {
    constexpr int kColumns = kSlopeThreads * kSlopeBytes / sizeof(T);
    const int64_t row = blockIdx.x;
    const int begin = blockIdx.y * kColumns, end = min(begin + kColumns, args.columns);
    Slopes slopes;
    slopes.scale = args.inv_tau ? args.inv_tau[row] : args.tau_number;
    slopes.lse = args.lse[row];
    slopes.alpha = args.alpha[row];
    slopes.with_beta = args.flags & WITH_BETA;
    slopes.beta = slopes.with_beta ? args.beta[row] : 0.0f;
    slopes.label = (args.flags & WITH_LABEL) ? args.label[row] : 0.0f;
    slopes.uniform = (args.flags & WITH_UNIFORM) ? args.uniform[row] : 0.0f;
    slopes.local = (args.flags & WITH_LABEL) ? local_target(args.target, row, args.flags, args.first) : -1;
    const T* logits = static_cast<const T*>(args.logits) + row * args.stride;
    Out* out = static_cast<Out*>(args.out) + row * args.out_stride;
    write_slopes<T, Out>(slopes, logits, out, begin, end, threadIdx.x, kSlopeThreads);
}

// One thread a row; states of disjoint columns merged in their order.
template <bool kRanked>
__global__ void merge_kernel(const float* states, int64_t state_stride, int64_t field_stride, float* out,
                             int64_t out_field_stride, int count, int64_t rows) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    RowState total = no_columns();
    float target = -INFINITY;
    for (int i = 0; i < count; ++i) {
        const float* part = states + i * state_stride + row;
        RowState next = no_columns();
        next.m = part[MAX * field_stride];
        next.s = part[SUM * field_stride];
        next.a = part[CENTRED * field_stride];
        next.u = part[SPREAD * field_stride];
        next.n = part[COUNT * field_stride];
        if (kRanked) {
            next.second = part[SECOND * field_stride];
            next.best = static_cast<int>(part[ARGMAX * field_stride]);
        }
        const float top = fmaxf(total.m, next.m);
        target = fmaxf(target + shift_to(total.m, top), part[TARGET * field_stride] + shift_to(next.m, top));
        total = merge<kRanked>(total, next);
    }
    out += row;
    out[MAX * out_field_stride] = total.m;
    out[SUM * out_field_stride] = total.s;
    out[CENTRED * out_field_stride] = total.a;
    out[SPREAD * out_field_stride] = total.u;
    out[TARGET * out_field_stride] = target;
    out[COUNT * out_field_stride] = total.n;
    if (kRanked) {
        out[SECOND * out_field_stride] = total.second;
        out[ARGMAX * out_field_stride] = static_cast<float>(total.best);
    }
}

template <typename T, bool kCentred, bool kRanked>
cudaError_t launch_row_state(const RowStateArgs& args, int64_t rows, int splits, bool cluster, cudaStream_t stream) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(rows), splits, 1);
    config.blockDim = dim3(args.split_columns > 16384 ? 512 : 256, 1, 1);
    config.stream = stream;
    cudaLaunchAttribute attribute[1];
    if (!cluster) return cudaLaunchKernelEx(&config, row_state_kernel<T, kCentred, kRanked, false>, args);
    attribute[0].id = cudaLaunchAttributeClusterDimension;
    attribute[0].val.clusterDim.x = 1;
    attribute[0].val.clusterDim.y = splits;
    attribute[0].val.clusterDim.z = 1;
    config.attrs = attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, row_state_kernel<T, kCentred, kRanked, true>, args);
}

template <typename T>
cudaError_t choose_row_state(const RowStateArgs& args, int64_t rows, int splits, bool cluster, cudaStream_t stream) {
    switch (args.flags & (WITH_CENTRED | RANKED)) {
        case 0: return launch_row_state<T, false, false>(args, rows, splits, cluster, stream);
        case WITH_CENTRED: return launch_row_state<T, true, false>(args, rows, splits, cluster, stream);
        case RANKED: return launch_row_state<T, false, true>(args, rows, splits, cluster, stream);
        default: return launch_row_state<T, true, true>(args, rows, splits, cluster, stream);
    }
}

template <typename T, typename Out>
cudaError_t launch_dlogits(const SlopeArgs& args, int64_t rows, cudaStream_t stream) {
    constexpr int kColumns = kSlopeThreads * kSlopeBytes / sizeof(T);
    const dim3 grid(static_cast<unsigned>(rows), (args.columns + kColumns - 1) / kColumns);
    dlogits_kernel<T, Out><<<grid, kSlopeThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace urlvr

using namespace urlvr;

// Types: 0 float, 1 bfloat16, 2 half. All functions return a cudaError_t, 0 for success, and launch on `stream` of `device`.
extern "C" {

int urlvr_abi_version() { return kAbiVersion; }

const char* urlvr_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// Versions of the driver and of the toolkit this was built with, as 1000 * major + 10 * minor.
int urlvr_versions(int* driver, int* toolkit) {
    const cudaError_t error = cudaDriverGetVersion(driver);
    return error == cudaSuccess ? cudaRuntimeGetVersion(toolkit) : error;
}

int urlvr_row_state(const void* logits, int dtype, int64_t stride, int64_t rows, int columns, int splits,
                    int split_columns, int cluster, float* state, int64_t field_stride, int64_t split_stride,
                    const void* target, int first, const float* inv_tau, float tau_number, int flags, int device,
                    void* stream) {
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    RowStateArgs args{logits, stride,       columns,      split_columns, first,   flags,
                      state,  field_stride, split_stride, target,        inv_tau, tau_number};
    cudaStream_t on = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case 0: return choose_row_state<float>(args, rows, splits, cluster, on);
        case 1: return choose_row_state<__nv_bfloat16>(args, rows, splits, cluster, on);
        case 2: return choose_row_state<__half>(args, rows, splits, cluster, on);
        default: return cudaErrorInvalidValue;
    }
}

int urlvr_dlogits(const void* logits, int dtype, int64_t stride, int64_t rows, int columns, void* out, int out_dtype,
                  int64_t out_stride, const void* target, int first, const float* inv_tau, float tau_number,
                  const float* lse, const float* alpha, const float* beta, const float* label, const float* uniform,
                  int flags, int device, void* stream) {
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    SlopeArgs args{logits, out, stride, out_stride, columns, first, flags,      target,
                   inv_tau, lse, alpha, beta,       label,   uniform, tau_number};
    cudaStream_t on = static_cast<cudaStream_t>(stream);
    switch (3 * dtype + out_dtype) {
        case 0: return launch_dlogits<float, float>(args, rows, on);
        case 1: return launch_dlogits<float, __nv_bfloat16>(args, rows, on);
        case 2: return launch_dlogits<float, __half>(args, rows, on);
        case 4: return launch_dlogits<__nv_bfloat16, __nv_bfloat16>(args, rows, on);
        case 8: return launch_dlogits<__half, __half>(args, rows, on);
        default: return cudaErrorInvalidValue;
    }
}

int urlvr_merge(const float* states, int64_t state_stride, int64_t field_stride, float* out, int64_t out_field_stride,
                int count, int64_t rows, int flags, int device, void* stream) {
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    constexpr int kThreads = 128;
    const unsigned blocks = static_cast<unsigned>((rows + kThreads - 1) / kThreads);
    cudaStream_t on = static_cast<cudaStream_t>(stream);
    if (flags & RANKED) {
        merge_kernel<true><<<blocks, kThreads, 0, on>>>(states, state_stride, field_stride, out, out_field_stride, count, rows);
    } else {
        merge_kernel<false><<<blocks, kThreads, 0, on>>>(states, state_stride, field_stride, out, out_field_stride, count, rows);
    }
    return cudaGetLastError();
}

}  // extern "C"
