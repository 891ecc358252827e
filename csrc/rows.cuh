// Tiles of rows: from a tensor (B, L, C) of any strides to shared memory, and numbers of any type to float.
#pragma once

#include "device.cuh"
#include "types.h"

namespace pyfused {

constexpr int kWarp = 32;

/// The rows that a block works on: `count` positions of image `batch` from `first` on.
struct Tile {
  int64_t batch;
  int64_t first;
  int count;
};

__device__ inline float load_number(const void* data, Number number, int64_t at) {
  switch (number) {
    case Number::kFloat16: return to_float(load_global(static_cast<const float16*>(data) + at));
    case Number::kBFloat16: return to_float(load_global(static_cast<const bfloat16*>(data) + at));
    default: return load_global(static_cast<const float*>(data) + at);
  }
}

__device__ inline float load_vector(const Vector& vector, int64_t i) {
  return load_number(vector.data, vector.number, i * vector.stride);
}

__device__ inline void store_number(void* data, Number number, int64_t at, float value) {
  switch (number) {
    case Number::kFloat16: return store_global(static_cast<float16*>(data) + at, from_float<float16>(value));
    case Number::kBFloat16: return store_global(static_cast<bfloat16*>(data) + at, from_float<bfloat16>(value));
    default: return store_global(static_cast<float*>(data) + at, value);
  }
}

template <class T>
__device__ inline void unpack_8(float (&to)[8], const uint4& from) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = to_float(T{static_cast<uint16_t>(words[i])});
    to[2 * i + 1] = to_float(T{static_cast<uint16_t>(words[i] >> 16)});
  }
}

template <class T>
__device__ inline uint4 pack_8(const float (&from)[8]) {
  return {pack<T>(from[0], from[1]), pack<T>(from[2], from[3]), pack<T>(from[4], from[5]), pack<T>(from[6], from[7])};
}

__device__ inline int64_t offset_in(const Rows& rows, int64_t batch, int64_t l, int64_t c) {
  return batch * rows.stride_b + l * rows.stride_l + c * rows.stride_c;
}

/// Eight numbers `step` apart, the first at `at`; the last 8 - `valid` are 0. `vector`: 16 bytes can be read at once.
__device__ inline void load_8(float (&to)[8], const Rows& from, int64_t at, int64_t step, bool vector, int valid) {
  if (vector && valid >= 8) {
    if (from.number == Number::kFloat32) {
      const auto* data = reinterpret_cast<const float4*>(static_cast<const float*>(from.data) + at);
      const float4 low = load_global(data), high = load_global(data + 1);
      to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
      to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
    } else {
      const uint4 words = load_global(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from.data) + at));
      if (from.number == Number::kFloat16) {
        unpack_8<float16>(to, words);
      } else {
        unpack_8<bfloat16>(to, words);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = i < valid ? load_number(from.data, from.number, at + i * step) : 0.0f;
  }
}

/// The other way round; nothing is written beyond `valid`.
__device__ inline void store_8(const float (&from)[8], const Rows& to, int64_t at, int64_t step, bool vector, int valid) {
  if (vector && valid >= 8) {
    if (to.number == Number::kFloat32) {
      auto* data = reinterpret_cast<float4*>(static_cast<float*>(to.data) + at);
      store_global(data, float4{from[0], from[1], from[2], from[3]});
      store_global(data + 1, float4{from[4], from[5], from[6], from[7]});
    } else {
      auto* data = reinterpret_cast<uint4*>(static_cast<uint16_t*>(to.data) + at);
      store_global(data, to.number == Number::kFloat16 ? pack_8<float16>(from) : pack_8<bfloat16>(from));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < valid) store_number(to.data, to.number, at + i * step, from[i]);
    }
  }
}

}  // namespace pyfused
