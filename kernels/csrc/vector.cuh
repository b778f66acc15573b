// Functions for host and device, and 16-byte loads and stores of float, bfloat16 and half, widened to float in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#define URLVR_FUNCTION __host__ __device__ __forceinline__
#ifdef __CUDA_ARCH__
#define URLVR_UNROLL _Pragma("unroll")
#else
#define URLVR_UNROLL
#endif

namespace urlvr {

URLVR_FUNCTION float exp_of(float x) {
#ifdef __CUDA_ARCH__
    return __expf(x);
#else
    return std::exp(x);
#endif
}

URLVR_FUNCTION int smaller(int x, int y) { return x < y ? x : y; }

URLVR_FUNCTION float widen(float x) { return x; }
URLVR_FUNCTION float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
URLVR_FUNCTION float widen(__half x) { return __half2float(x); }

URLVR_FUNCTION void narrow(float x, float& out) { out = x; }
URLVR_FUNCTION void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
URLVR_FUNCTION void narrow(float x, __half& out) { out = __float2half_rn(x); }

template <typename T>
struct Vector {
    static constexpr int kWidth = 16 / sizeof(T);
    union {
        uint4 bits;
        T values[kWidth];
    };
    URLVR_FUNCTION Vector() {}
    URLVR_FUNCTION explicit Vector(const T* aligned) : bits(*reinterpret_cast<const uint4*>(aligned)) {}
    URLVR_FUNCTION void store(T* aligned) const { *reinterpret_cast<uint4*>(aligned) = bits; }
};

// Elements before the first 16-byte border at or after `p`.
template <typename T>
URLVR_FUNCTION int elements_to_border(const T* p) {
    const unsigned beyond = static_cast<unsigned>(reinterpret_cast<uintptr_t>(p) & 15u);
    return beyond == 0 ? 0 : static_cast<int>((16u - beyond) / sizeof(T));
}

}  // namespace urlvr
