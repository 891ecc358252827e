// What the torch side hands to launchers: no torch header, no CUDA header.
#pragma once

#include <cstdint>

namespace pyfused {

enum class Number : int { kFloat32, kFloat16, kBFloat16 };

/// What 16 bytes at a time can be read along: the channels of a row, the positions of a channel, or neither.
enum class Access : int { kElements, kChannels, kPositions };

/// A tensor (B, L, C) with any strides, in elements; row m is b L + l. `data` is null where there is
/// none. A weight (N, K) is one of batch 1, with N for L.
struct Rows {
  void* data = nullptr;
  Number number = Number::kFloat32;
  int64_t stride_b = 0, stride_l = 0, stride_c = 0;
  Access access = Access::kElements;
};

inline int bytes_of(Number number) { return number == Number::kFloat32 ? 4 : 2; }

/// `rows` with the access that its strides and its address allow.
inline Rows with_access(Rows rows) {
  const int vector = 16 / bytes_of(rows.number);
  const auto aligned = [&](int64_t other_stride) {
    return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride_b % vector == 0 && other_stride % vector == 0;
  };
  if (rows.stride_c == 1 && aligned(rows.stride_l)) {
    rows.access = Access::kChannels;
  } else if (rows.stride_l == 1 && aligned(rows.stride_c)) {
    rows.access = Access::kPositions;
  }
  return rows;
}

/// Numbers with one stride, 0 where one number serves all; `data` is null where there are none.
struct Vector {
  void* data = nullptr;
  Number number = Number::kFloat32;
  int64_t stride = 0;
};

/// Dropout's mask (philox.cuh): the seed lies on the device.
struct Dropout {
  const int64_t* seed = nullptr;  // null: none
  uint32_t threshold = 0;         // floor(p 2^32)
  float inverse_keep = 1.0f;      // 1 / (1 - p)
};

}  // namespace pyfused
