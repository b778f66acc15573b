// Stands in for CUDA's header where there is no CUDA toolkit: what the per-thread functions need of it, on the host.
#pragma once

#include <cstdint>
#include <cstring>

#define __host__
#define __device__
#define __forceinline__ inline

struct uint4 {
    uint32_t x, y, z, w;
};
