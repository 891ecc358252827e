// The bottleneck family: rows (M, C), a narrow middle (M, J) and rows again, in one block per tile of rows.
//
// The tile's rows stay in shared memory between the two products: one read of them from memory. The weights stream by
// in tiles of kChunk channels, the first weight's and then the second's in one pipeline; the middle goes from registers
// to shared memory, where it is the second product's operand.
#pragma once

#include "mma.cuh"
#include "philox.cuh"
#include "tiles.cuh"

namespace pyfused {

/// A block has kRowWarps bands of 16 rows and kColumnWarps warps to a band, which share the columns of either product.
/// With kFloatMiddle_ a row of the middle has room for its numbers in float32, where they wait to be rounded.
template <class T_, int kNarrow_, int kRowWarps_, bool kFloatMiddle_ = false>
struct Bottleneck {
  using T = T_;
  static constexpr int kNarrow = kNarrow_;
  static constexpr int kColumnWarps = kNarrow > 64 ? 2 : 1;
  static constexpr int kThreads = kRowWarps_ * kColumnWarps * kWarp;
  static constexpr int kRows = kRowWarps_ * 16;
  static constexpr int kChunk = kNarrow > 64 ? 32 : 64;
  // Columns of one warp, in the first product and in the second.
  static constexpr int kNarrowOwn = kNarrow / kColumnWarps, kWideOwn = kChunk / kColumnWarps;
  // A weight's tile is flat, kNarrow rows of kChunk, or tall, kChunk rows of kNarrow; the middle is as wide as a tall one.
  static constexpr int kFlatPitch = tile_pitch(kChunk);
  static constexpr int kTallPitch = tile_pitch(kNarrow);
  static constexpr int kMiddlePitch = kFloatMiddle_ ? tile_pitch(2 * kNarrow) : kTallPitch;
  static constexpr int kSlot = kNarrow * kFlatPitch > kChunk * kTallPitch ? kNarrow * kFlatPitch : kChunk * kTallPitch;
  // Floats from one row to the next where sums change hands: eight rows in different banks.
  static constexpr int kStagingPitch = kWideOwn + 8;

  __host__ __device__ static constexpr int chunks(int channels) { return (channels + kChunk - 1) / kChunk; }
  __host__ __device__ static constexpr int row_pitch(int channels) { return tile_pitch(chunks(channels) * kChunk); }
  static constexpr int shared_bytes(int channels, int stages) {
    return 2 * (kRows * (row_pitch(channels) + kMiddlePitch) + stages * kSlot) +
           4 * (kRows * kColumnWarps * kStagingPitch + kRows + kWarp + kNarrow + 2 * chunks(channels) * kChunk);
  }

  /// The first row of this warp's band, and the first of its columns.
  __device__ static int first_row() { return threadIdx.x / kWarp / kColumnWarps * 16; }
  __device__ static int first_narrow() { return threadIdx.x / kWarp % kColumnWarps * kNarrowOwn; }
  __device__ static int first_wide() { return threadIdx.x / kWarp % kColumnWarps * kWideOwn; }
};

/// What a block keeps in shared memory.
template <class B>
struct BottleneckMemory {
  typename B::T* rows;    // (kRows, row_pitch)
  typename B::T* middle;  // (kRows, kMiddlePitch)
  typename B::T* slots;   // (stages, kSlot)
  float* staging;         // (warps, 16, kStagingPitch)
  float* gate;            // (chunks * kChunk), one number for each channel
  float* bias;            // (chunks * kChunk)
  float* narrow_bias;     // (kNarrow)
  float* keep;            // (kRows), the factor of each row's sample, 0 in rows that do not exist
  float* scratch;         // (kWarp)

  __device__ BottleneckMemory(int channels, int stages) {
    rows = reinterpret_cast<typename B::T*>(shared_memory());
    middle = rows + B::kRows * B::row_pitch(channels);
    slots = middle + B::kRows * B::kMiddlePitch;
    staging = reinterpret_cast<float*>(slots + stages * B::kSlot);
    gate = staging + B::kRows * B::kColumnWarps * B::kStagingPitch;
    bias = gate + B::chunks(channels) * B::kChunk;
    narrow_bias = bias + B::chunks(channels) * B::kChunk;
    keep = narrow_bias + B::kNarrow;
    scratch = keep + B::kRows;
  }
};

/// The tile of kRows rows of block `block`, for `tiles_l` tiles an image.
__device__ inline Tile tile_of(int64_t block, int rows, int tiles_l, int64_t length) {
  const int64_t first = block % tiles_l * rows;
  return {block / tiles_l, first, static_cast<int>(min(static_cast<int64_t>(rows), length - first))};
}

/// The factor of each sample, `per_sample` rows each; without any it is 1.
struct SampleScale {
  Vector scale;
  int64_t per_sample;

  /// The factors of a tile's rows to shared memory, for the whole block: whether any is not 0.
  template <int kRows>
  __device__ bool load(float* keep, const Tile& tile, int64_t length) const {
    for (int row = threadIdx.x; row < kRows; row += blockDim.x) {
      const auto m = static_cast<uint32_t>(tile.batch * length + tile.first + row);
      float factor = row < tile.count ? 1.0f : 0.0f;
      if (row < tile.count && scale.data != nullptr) factor = load_vector(scale, m / static_cast<uint32_t>(per_sample));
      store_shared(keep + row, factor);
    }
    __syncthreads();
    if (scale.data == nullptr) return true;
    bool any = false;
#pragma unroll 1
    for (int row = 0; row < kRows; ++row) any |= load_shared(keep + row) != 0.0f;
    return any;
  }
};

/// The rows of a tile whose samples are not dropped.
struct KeptRows {
  const float* keep;
  __device__ bool operator()(int row) const { return load_shared(keep + row) != 0.0f; }
};

/// `count` numbers to shared memory, rounded to T, then zeros up to `padded`; `otherwise` without a vector.
template <class T>
__device__ inline void load_numbers(float* to, const Vector& from, int count, int padded, float otherwise) {
#pragma unroll 1
  for (int i = threadIdx.x; i < padded; i += blockDim.x) {
    const float number = from.data == nullptr ? otherwise : i < count ? load_vector(from, i) : 0.0f;
    store_shared(to + i, to_float(from_float<T>(number)));
  }
}

/// Brings tiles one after another into a ring of slots, stages - 1 of them under way while one is used: `fetch(tile,
/// slot)` starts one.
template <class Fetch>
class Pipeline {
 public:
  __device__ Pipeline(int tiles, int stages, const Fetch& fetch)
      : tiles_(tiles), stages_(stages), next_(1 - stages), fetch_(fetch) {}

  /// Calls `use(tile, slot)` for the next tiles up to `end`.
  template <class Use>
  __device__ void run(int end, const Use& use) {
#pragma unroll 1
    for (; next_ < end; ++next_) {
      if (next_ >= 0) {
        switch (stages_) {
          case 2: cp_async_wait<0>(); break;
          case 3: cp_async_wait<1>(); break;
          default: cp_async_wait<2>(); break;
        }
        // The tile is there for all threads, and the slot of the one before may be overwritten.
        __syncthreads();
      }
      const int ahead = next_ + stages_ - 1;
      if (ahead < tiles_) fetch_(ahead, ahead % stages_);
      cp_async_commit();
      if (next_ >= 0) use(next_, next_ % stages_);
    }
  }

 private:
  int tiles_, stages_, next_;
  const Fetch& fetch_;
};

/// Leaves the rows' fragments of `narrow_product` as they are.
struct Unchanged {
  __device__ void operator()(uint32_t (&)[4], int) const {}
};

/// sum (this warp's rows and narrow columns) += rows W over the channels of one chunk: a flat tile of W^T, or with kTall
/// one of W. `change(a, c)` may change the rows' fragment of channels c to c + 15.
template <class B, bool kTall, class Change>
__device__ inline void narrow_product(float (&sum)[B::kNarrowOwn / 8][4], const typename B::T* tile,
                                      const BottleneckMemory<B>& memory, int c0, int channels, const Change& change) {
#pragma unroll
  for (int k = 0; k < B::kChunk; k += 16) {
    if (c0 + k >= channels) break;
    uint32_t a[4];
    load_a(a, memory.rows, B::row_pitch(channels), B::first_row(), c0 + k);
    change(a, c0 + k);
    mma_step<typename B::T, B::kNarrowOwn / 8, kTall>(sum, a, tile, kTall ? B::kTallPitch : B::kFlatPitch,
                                                      B::first_narrow(), k);
  }
}

/// Where this thread's first number of the middle lies; tile i of its sums is 8 i columns on, their second row 8 down.
template <class B>
__device__ inline typename B::T* own_middle(const BottleneckMemory<B>& memory) {
  const int lane = threadIdx.x % kWarp;
  return memory.middle + (B::first_row() + lane / 4) * B::kMiddlePitch + B::first_narrow() + lane % 4 * 2;
}

/// This warp's part of the middle to shared memory; the next barrier shows it to all.
template <class B>
__device__ inline void put_middle(const BottleneckMemory<B>& memory, const float (&middle)[B::kNarrowOwn / 8][4]) {
  using T = typename B::T;
  T* at = own_middle(memory);
#pragma unroll
  for (int i = 0; i < B::kNarrowOwn / 8; ++i, at += 8) {
    store_shared(reinterpret_cast<uint32_t*>(at), pack<T>(middle[i][0], middle[i][1]));
    store_shared(reinterpret_cast<uint32_t*>(at + 8 * B::kMiddlePitch), pack<T>(middle[i][2], middle[i][3]));
  }
}

/// sum (this warp's rows and wide columns) = middle W for one chunk of channels: a flat tile of W, or with kTall one of
/// W^T.
template <class B, bool kTall>
__device__ inline void wide_product(float (&sum)[B::kWideOwn / 8][4], const typename B::T* tile,
                                    const BottleneckMemory<B>& memory) {
#pragma unroll
  for (int i = 0; i < B::kWideOwn / 8; ++i) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
#pragma unroll 4
  for (int k = 0; k < B::kNarrow; k += 16) {
    uint32_t a[4];
    load_a(a, memory.middle, B::kMiddlePitch, B::first_row(), k);
    mma_step<typename B::T, B::kWideOwn / 8, !kTall>(sum, a, tile, kTall ? B::kTallPitch : B::kFlatPitch,
                                                     B::first_wide(), k);
  }
}

/// Where eight numbers lie: of one row from `column` on, or with `down` of one column from `row` on; in the tile.
struct Eight {
  int row, column;
  bool down;
  int valid;

  __device__ int row_of(int j) const { return down ? row + j : row; }

  /// The same eight of another tensor.
  __device__ void load(float (&to)[8], const Rows& from, const Tile& tile) const {
    load_8(to, from, offset_in(from, tile.batch, tile.first + row, column), down ? from.stride_l : from.stride_c,
           from.access == (down ? Access::kPositions : Access::kChannels), valid);
  }

  __device__ void store(const float (&from)[8], const Rows& to, const Tile& tile) const {
    store_8(from, to, offset_in(to, tile.batch, tile.first + row, column), down ? to.stride_l : to.stride_c,
            to.access != Access::kElements, valid);
  }

  /// Out of shared memory, from rows that are `pitch` apart; those beyond `valid` are whatever is there.
  template <class T>
  __device__ void load(float (&to)[8], const T* from, int pitch) const {
    from += row * pitch + column;
    if (down) {
#pragma unroll
      for (int j = 0; j < 8; ++j) to[j] = to_float(load_shared(from + j * pitch));
    } else {
      load(to, from);
    }
  }

  /// Numbers of the columns, one for each.
  __device__ void load_of_columns(float (&to)[8], const float* from) const {
    if (down) {
      const float one = load_shared(from + column);
#pragma unroll
      for (float& number : to) number = one;
    } else {
      load(to, from + column);
    }
  }

 private:
  __device__ static void load(float (&to)[8], const float* from) {
    const float4 low = load_shared(reinterpret_cast<const float4*>(from));
    const float4 high = load_shared(reinterpret_cast<const float4*>(from) + 1);
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
  }
  template <class T>
  __device__ static void load(float (&to)[8], const T* from) {
    unpack_8<T>(to, load_shared(reinterpret_cast<const uint4*>(from)));
  }
};

/// Writes sums of one chunk of channels to `to`, eight at a time once `finish(numbers, where)` has changed them, in 16
/// bytes where `to` allows that. A barrier must lie between two calls: they use the same memory.
template <class B, class Finish>
__device__ inline void store_chunk(const float (&sum)[B::kWideOwn / 8][4], const BottleneckMemory<B>& memory,
                                   const Rows& to, const Tile& tile, int c0, int channels, const Finish& finish) {
  const int lane = threadIdx.x % kWarp, first = B::first_row(), c = c0 + B::first_wide();
  float* mine = memory.staging + threadIdx.x / kWarp * 16 * B::kStagingPitch;
#pragma unroll
  for (int i = 0; i < B::kWideOwn / 8; ++i) {
    float* at = mine + lane / 4 * B::kStagingPitch + 8 * i + lane % 4 * 2;
    store_shared(reinterpret_cast<float2*>(at), float2{sum[i][0], sum[i][1]});
    store_shared(reinterpret_cast<float2*>(at + 8 * B::kStagingPitch), float2{sum[i][2], sum[i][3]});
  }
  __syncwarp();
  const bool down = runs_down(to);
#pragma unroll 1
  for (int i = lane; i < 2 * B::kWideOwn; i += kWarp) {
    const int row = down ? i % 2 * 8 : i / (B::kWideOwn / 8), column = down ? i / 2 : i % (B::kWideOwn / 8) * 8;
    const int rows = tile.count - first - row, columns = channels - c - column;
    if (rows <= 0 || columns <= 0) continue;
    float numbers[8];
    Eight{row, column, down, 8}.load(numbers, mine, B::kStagingPitch);
    const Eight where{first + row, c + column, down, min(8, down ? rows : columns)};
    finish(numbers, where);
    where.store(numbers, to, tile);
  }
}

/// Rows of `from` to `to`, or zeros without `from`.
__device__ inline void copy_rows(const Rows& from, const Rows& to, const Tile& tile, int channels) {
  const bool down = runs_down(to);
  const int groups = ((down ? tile.count : channels) + 7) / 8, total = groups * (down ? channels : tile.count);
#pragma unroll 1
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    const int across = i % groups * 8, along = i / groups;
    const Eight where{down ? across : along, down ? along : across, down,
                      min(8, (down ? tile.count : channels) - across)};
    float numbers[8] = {};
    if (from.data != nullptr) where.load(numbers, from, tile);
    where.store(numbers, to, tile);
  }
}

/// The largest of the threads' numbers, for the whole block; `scratch` has a number for each warp.
__device__ inline float block_max(float largest, float* scratch) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, lanes));
  }
  if (threadIdx.x % kWarp == 0) store_shared(scratch + threadIdx.x / kWarp, largest);
  __syncthreads();
  for (int warp = 0; warp < blockDim.x / kWarp; ++warp) largest = fmaxf(largest, load_shared(scratch + warp));
  return largest;
}

/// Square root of the largest |gate|, for the whole block; 1 where all are 0 or next to it, or there is none.
__device__ inline float gate_root(const Vector& gate, int channels, float* scratch) {
  if (gate.data == nullptr) return 1.0f;
  float largest = 0.0f;
  for (int c = threadIdx.x; c < channels; c += blockDim.x) largest = fmaxf(largest, fabsf(load_vector(gate, c)));
  largest = block_max(largest, scratch);
  return largest < 1e-30f ? 1.0f : sqrtf(largest);
}

/// What dropout keeps of a thread's `4 tiles` elements of a sum in rows m and m + 8 of the mask, whose first tile starts
/// at `column`, a multiple of 8: bit 4 i + j is element j of tile i. All of it without a seed.
__device__ inline uint64_t kept_elements(const Dropout& dropout, int64_t m, int column, int tiles) {
  if (dropout.seed == nullptr) return ~uint64_t{0};
  const auto seed = static_cast<uint64_t>(load_global(dropout.seed));
  const int lane = threadIdx.x % kWarp;
  const bool odd = lane % 2 != 0;
  uint64_t kept = 0;
  // Drawn here and not where it is used, in loops that are unrolled.
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    // Two neighbouring lanes need halves of the same quads in both rows: each draws one row's for both.
    const uint4 words = philox(seed, (column + 8 * i) / 4 + lane % 4 / 2, m + (odd ? 8 : 0));
    const uint32_t mine = (words.x >= dropout.threshold) | (words.y >= dropout.threshold) << 1 |
                          (words.z >= dropout.threshold) << 2 | (words.w >= dropout.threshold) << 3;
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, mine, 1);
    const uint32_t low = odd ? other >> 2 : mine & 3, high = odd ? mine >> 2 : other & 3;
    kept |= static_cast<uint64_t>(low | high << 2) << 4 * i;
  }
  return kept;
}

/// The middle, which every warp has put in its place, to the rows of a matrix.
template <class B>
__device__ inline void store_middle(const BottleneckMemory<B>& memory, const Rows& to, const Tile& tile, int columns) {
  __syncthreads();
  store_tile<typename B::T, B::kRows, B::kNarrow, B::kThreads>(to, memory.middle, B::kMiddlePitch, tile, 0, columns);
}

}  // namespace pyfused
