// Stands in for CUDA's header: bfloat16 as the upper half of a float, rounded to nearest, ties to even.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float out;
    std::memcpy(&out, &wide, sizeof(out));
    return out;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, sizeof(wide));
    return {static_cast<uint16_t>((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16)};
}
