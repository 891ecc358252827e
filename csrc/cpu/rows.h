// Which rows of tensors a kernel takes, and how tiles of them lie; no torch header.
#pragma once

#include "../types.h"
#include "guard.h"

namespace pyfused {

/// Rows of one image, one after another: `count` from `row` on, which are number `at` of those that are taken.
struct Span {
  int64_t row, at, count;
};

/// The rows that are taken; images have `length` rows.
struct Live {
  const Span* spans;
  int64_t count;
  int64_t length;
};

/// The most rows of a block, channels of a panel, and channels whose products are finished together.
constexpr int64_t kMostRows = 96, kMostPanel = 64, kMostColumns = 256;
/// Sums are made of as many rows at a time, times columns of the middle and channels: tiles that stay in a cache of 512 KB.
constexpr int64_t kChunk = 128, kMostHeight = 256, kSumsColumns = 128;

/// Rows that are packed side by side, at most; the last of them may be empty.
constexpr int64_t kMostPackedRows = 16;

/// The most floats that a tile takes.
static inline int64_t tile_size(int64_t rows, int64_t columns) { return rows * ((columns + 15) / 16 * 16 + 16); }

/// Whether positions lie together, and channels do not.
static inline bool by_positions(const Rows& x) { return x.stride_l == 1 && x.stride_c != 1; }

/// Whether products can read rows, or turned ones channels, where they lie. Those whole pages apart would meet in one
/// set of a cache.
static inline bool readable_in_place(const Rows& x, bool turned) {
  const int64_t inner = turned ? x.stride_l : x.stride_c, outer = turned ? x.stride_c : x.stride_l;
  return x.number == Number::kFloat32 && inner == 1 && outer % 1024 != 0;
}

}  // namespace pyfused
