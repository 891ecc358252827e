// CUDA's own names, as far as kernels use them; a part of emulator.h.
#pragma once

#include <cmath>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Those of the running thread: whoever switches threads sets them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline void __syncthreads(pyfused::emulator::Source source = pyfused::emulator::Source::here()) {
  pyfused::emulator::barrier({"__syncthreads", source});
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFF,
                       pyfused::emulator::Source source = pyfused::emulator::Source::here()) {
  pyfused::emulator::sync_warp(mask, {"__syncwarp", source});
}

namespace pyfused::emulator {

template <class T>
T shuffle_value(unsigned mask, T value, int from, const Site& site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, from, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace pyfused::emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, pyfused::emulator::Source source = pyfused::emulator::Source::here()) {
  return pyfused::emulator::shuffle_value(mask, value, lane & 31, {"__shfl_sync", source});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask,
                  pyfused::emulator::Source source = pyfused::emulator::Source::here()) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return pyfused::emulator::shuffle_value(mask, value, lane ^ lane_mask, {"__shfl_xor_sync", source});
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline float __uint_as_float(unsigned bits) { return pyfused::emulator::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return pyfused::emulator::bit_cast<unsigned>(x); }
inline float __int_as_float(int bits) { return pyfused::emulator::bit_cast<float>(bits); }
inline int __float_as_int(float x) { return pyfused::emulator::bit_cast<int>(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

#define PYFUSED_MIN_MAX(A, B, Result) \
  constexpr Result min(A a, B b) {    \
    const Result x = a, y = b;        \
    return y < x ? y : x;             \
  }                                   \
  constexpr Result max(A a, B b) {    \
    const Result x = a, y = b;        \
    return x < y ? y : x;             \
  }
PYFUSED_MIN_MAX(int, int, int)
PYFUSED_MIN_MAX(unsigned, unsigned, unsigned)
PYFUSED_MIN_MAX(int, unsigned, unsigned)
PYFUSED_MIN_MAX(unsigned, int, unsigned)
PYFUSED_MIN_MAX(long, long, long)
PYFUSED_MIN_MAX(unsigned long, unsigned long, unsigned long)
PYFUSED_MIN_MAX(long long, long long, long long)
PYFUSED_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef PYFUSED_MIN_MAX
// Of a NaN and a number, the number.
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
