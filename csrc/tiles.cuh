// Tiles of 16-bit rows and of matrices, to shared memory and back, eight numbers at a time.
#pragma once

#include "rows.cuh"

namespace pyfused {

/// Whether neighbours in memory are neighbours down a column.
__host__ __device__ inline bool runs_down(const Rows& rows) {
  return rows.access == Access::kPositions || (rows.access == Access::kElements && rows.stride_l < rows.stride_c);
}

/// Eight 16-bit numbers in 16 bytes: number(j) gives the bits of each.
template <class Get>
__device__ inline uint4 pairs_of(const Get& number) {
  return {number(0) | number(1) << 16, number(2) | number(3) << 16, number(4) | number(5) << 16,
          number(6) | number(7) << 16};
}

/// The other way round: body(j, bits).
template <class Body>
__device__ inline void for_numbers(const uint4& words, const Body& body) {
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int j = 0; j < 8; ++j) body(j, static_cast<uint16_t>(pairs[j / 2] >> j % 2 * 16));
}

/// Every row of a tile is read.
struct AllRows {
  __device__ bool operator()(int) const { return true; }
};

/// Eight numbers of a tile (kRows, kColumns) on their way to shared memory through registers, along the tile's rows or,
/// where memory runs that way, down its columns. Other work may go on between load and store.
template <class T, int kRows, int kColumns>
class Chunk {
 public:
  static constexpr int kCount = kRows * kColumns / 8;

  /// Chunk i of the tile's rows and of columns c0 to c0 + kColumns; 0 beyond `channels` and the tile's count.
  __device__ void load(int i, const Rows& from, const Tile& tile, int c0, int channels) {
    down_ = runs_down(from);
    row_ = down_ ? i % (kRows / 8) * 8 : i / (kColumns / 8);
    column_ = down_ ? i / (kRows / 8) : i % (kColumns / 8) * 8;
    const int c = c0 + column_;
    const bool exists = i < kCount && row_ < tile.count && c < channels;
    const int valid = exists ? (down_ ? tile.count - row_ : channels - c) : 0;
    const int64_t at = exists ? offset_in(from, tile.batch, tile.first + row_, c) : 0;
    const int64_t step = down_ ? from.stride_l : from.stride_c;
    const bool vector = from.access != Access::kElements && valid >= 8;
    is_float_ = from.number == Number::kFloat32;
    if (is_float_) {
      load_8(numbers_, from, at, step, vector, valid);
    } else if (vector) {
      words_ = load_global(reinterpret_cast<const uint4*>(static_cast<const T*>(from.data) + at));
    } else {
      const auto number = [&](int j) -> uint32_t {
        return j < valid ? load_global(static_cast<const T*>(from.data) + at + j * step).bits : 0;
      };
      words_ = pairs_of(number);
    }
  }

  /// Rows that `live` denies are 0; `scale` is for float32 alone.
  template <class Live = AllRows>
  __device__ void store(T* shared, int pitch, const Live& live = {}, float scale = 1.0f) {
    if (is_float_) {
#pragma unroll
      for (float& number : numbers_) number *= scale;
      words_ = pack_8<T>(numbers_);
    }
    T* to = shared + row_ * pitch + column_;
    if (down_) {
      for_numbers(words_, [&](int j, uint16_t bits) {
        store_shared(to + j * pitch, T{live(row_ + j) ? bits : uint16_t{0}});
      });
    } else {
      store_shared(reinterpret_cast<uint4*>(to), live(row_) ? words_ : uint4{0, 0, 0, 0});
    }
  }

 private:
  float numbers_[8];
  uint4 words_;
  int row_, column_;
  bool down_, is_float_;
};

/// Where the first numbers lie that a thread copies of a tile.
template <class T, int kColumns>
__device__ inline const T* copied_first(const Rows& from, const Tile& tile, int c0) {
  const int row = threadIdx.x / (kColumns / 8), column = threadIdx.x % (kColumns / 8) * 8;
  return static_cast<const T*>(from.data) + offset_in(from, tile.batch, tile.first + row, c0 + column);
}

/// A tile of rows or of a matrix to `shared`, whose rows are `pitch` apart; 0 beyond `channels`, beyond the tile's
/// count and in rows that `live` denies; float32 is multiplied by `scale` and rounded. It is under way until the next
/// cp_async_wait where rows can be copied as they are, else there after the next __syncthreads. `at` is the tile's
/// copied_first, which a loop over tiles counts up instead of making it anew.
template <class T, int kRows, int kColumns, int kThreads, class Live = AllRows>
__device__ inline void load_tile_at(T* shared, int pitch, const Rows& from, const Tile& tile, int c0, int channels,
                                    const T* at, const Live& live = {}, float scale = 1.0f) {
  constexpr int kCount = kRows * kColumns / 8, kAcross = kColumns / 8;
  if (from.access == Access::kChannels && from.number != Number::kFloat32) {
    // Whole rows at a time: threads that do not fill another one stand by.
    constexpr int kStep = kThreads / kAcross, kEach = (kRows + kStep - 1) / kStep;
    static_assert(kStep > 0);
    if (kThreads % kAcross != 0 && threadIdx.x >= kStep * kAcross) return;
    const int first = threadIdx.x / kAcross, column = threadIdx.x % kAcross * 8;
    const int within = max(0, min(8, channels - c0 - column));
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = first + i * kStep, valid = row < tile.count && live(row) ? within : 0;
      if (kRows % kStep != 0 && row >= kRows) break;
      const T* data = valid > 0 ? at + i * kStep * from.stride_l : static_cast<const T*>(from.data);
      cp_async_16(shared + row * pitch + column, data, 2 * valid);
    }
  } else {
#pragma unroll 1
    for (int index = threadIdx.x; index < kCount; index += kThreads) {
      Chunk<T, kRows, kColumns> chunk;
      chunk.load(index, from, tile, c0, channels);
      chunk.store(shared, pitch, live, scale);
    }
  }
}

template <class T, int kRows, int kColumns, int kThreads, class Live = AllRows>
__device__ inline void load_tile(T* shared, int pitch, const Rows& from, const Tile& tile, int c0, int channels,
                                 const Live& live = {}, float scale = 1.0f) {
  load_tile_at<T, kRows, kColumns, kThreads>(shared, pitch, from, tile, c0, channels,
                                             copied_first<T, kColumns>(from, tile, c0), live, scale);
}

/// The other way round, to rows in T; nothing is written beyond `channels` and the tile's count.
template <class T, int kRows, int kColumns, int kThreads>
__device__ inline void store_tile(const Rows& to, const T* shared, int pitch, const Tile& tile, int c0, int channels) {
  constexpr int kCount = kRows * kColumns / 8;
  static_assert(kCount % kThreads == 0);
  const bool down = runs_down(to);
  const int64_t step = down ? to.stride_l : to.stride_c;
#pragma unroll 2
  for (int i = 0; i < kCount / kThreads; ++i) {
    const int index = threadIdx.x + i * kThreads;
    const int row = down ? index % (kRows / 8) * 8 : index / (kColumns / 8);
    const int column = down ? index / (kRows / 8) : index % (kColumns / 8) * 8, c = c0 + column;
    const int valid = down ? (c < channels ? tile.count - row : 0) : (row < tile.count ? channels - c : 0);
    if (valid <= 0) continue;
    const T* from = shared + row * pitch + column;
    uint4 words;
    if (down) {
      const auto number = [&](int j) -> uint32_t { return load_shared(from + j * pitch).bits; };
      words = pairs_of(number);
    } else {
      words = load_shared(reinterpret_cast<const uint4*>(from));
    }
    T* at = static_cast<T*>(to.data) + offset_in(to, tile.batch, tile.first + row, c);
    if (to.access != Access::kElements && valid >= 8) {
      store_global(reinterpret_cast<uint4*>(at), words);
    } else {
      for_numbers(words, [&](int j, uint16_t bits) {
        if (j < valid) store_global(at + j * step, T{bits});
      });
    }
  }
}

}  // namespace pyfused
