// Products of a tile with a matrix that lies in panels.
#pragma once

#include "simd.h"

namespace pyfused {
namespace {

/// Terms that are added up in one chain.
constexpr int64_t kChain = 256;

/// out (kHeight, kWidth vectors) = or += the sum over k of a[r row + k step] b[k, ...].
template <int kHeight, int kWidth>
INLINE void product_of_rows(int64_t depth, const float* a, int64_t row, int64_t step, const float* b, int64_t b_pitch,
                            float* out, int64_t pitch, bool adds, int64_t ahead = 0) {
  Vec total[kHeight][kWidth] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[kWidth];
    __builtin_prefetch(a + k * step + ahead, 0, 2);
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; ++j) right[j] = load(b + k * b_pitch + j * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kHeight; ++r) {
      const Vec left = splat(a[r * row + k * step]);
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; ++j) total[r][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kHeight; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; ++j) {
      float* there = out + r * pitch + j * kLanes;
      store(there, adds ? load(there) + total[r][j] : total[r][j]);
    }
}

/// The last rows, fewer than kHeight + 1.
template <int kHeight, int kWidth>
INLINE void product_of_last(int64_t rows, int64_t depth, const float* a, int64_t row, int64_t step, const float* b,
                            int64_t b_pitch, float* out, int64_t pitch, bool adds) {
  if constexpr (kHeight > 0) {
    if (rows == kHeight) return product_of_rows<kHeight, kWidth>(depth, a, row, step, b, b_pitch, out, pitch, adds);
    product_of_last<kHeight - 1, kWidth>(rows, depth, a, row, step, b, b_pitch, out, pitch, adds);
  }
}

/// A matrix as a product reads it from the left: element (r, k) lies at r row + k step, but where rows are packed, kRows of
/// them side by side, at r / kRows group + r % kRows + k kRows. Meanwhile what lies `ahead` elements on comes into the
/// second-level cache: lines of a page each, which no processor foresees; 0 where it does.
struct Left {
  const float* data;
  int64_t row, step, group, ahead;
};
INLINE Left rows_of(const float* data, int64_t pitch) { return {data, pitch, 1, kRows * pitch, 0}; }

template <int kWidth>
__attribute__((noinline)) void product_of_width(int64_t rows, int64_t depth, Left a, const float* b, int64_t b_pitch,
                                                float* out, int64_t pitch, bool adds) {
  for (int64_t start = 0; start < depth; start += kChain) {
    const int64_t terms = least(kChain, depth - start);
    const bool also = adds || start > 0;
    const float *left = a.data + start * a.step, *right = b + start * b_pitch;
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows, left += a.group) {
      product_of_rows<kRows, kWidth>(terms, left, a.row, a.step, right, b_pitch, out + r * pitch, pitch, also,
                                     a.ahead);
    }
    product_of_last<kRows - 1, kWidth>(rows - r, terms, left, a.row, a.step, right, b_pitch, out + r * pitch, pitch,
                                       also);
  }
}

/// out (rows, columns) = or += a b, for up to kWidth vectors of columns, whole vectors of which are read and written.
template <int kWidth = kVectors>
INLINE void product(int64_t rows, int64_t columns, int64_t depth, const Left& a, const float* b, int64_t b_pitch,
                    float* out, int64_t pitch, bool adds) {
  if constexpr (kWidth > 1) {
    if (columns <= (kWidth - 1) * kLanes) {
      return product<kWidth - 1>(rows, columns, depth, a, b, b_pitch, out, pitch, adds);
    }
  }
  product_of_width<kWidth>(rows, depth, a, b, b_pitch, out, pitch, adds);
}

/// The transpose of x (rows, columns), packed; room for `packed_size`.
INLINE int64_t packed_size(int64_t rows, int64_t columns) { return rounded_up(columns, kRows) * rows + kLanes; }
INLINE Left pack_transposed(const float* x, int64_t pitch, int64_t rows, int64_t columns, float* packed) {
  for (int64_t c = 0; c < columns; c += kRows) {
    float* group = packed + c * rows;
    const int64_t some = least(kRows, columns - c);
    for (int64_t r = 0; r < rows; ++r) {
      float* there = group + r * kRows;
      const float* from = x + r * pitch + c;
      if (c + kLanes <= columns) {
        // What is behind a row's part is overwritten by the next row.
        for (int64_t i = 0; i < kRows; i += kLanes) store(there + i, load(from + i));
      } else {
        for (int64_t i = 0; i < some; ++i) there[i] = from[i];
      }
    }
  }
  return {packed, 1, kRows, kRows * rows, 0};
}

}  // namespace
}  // namespace pyfused
