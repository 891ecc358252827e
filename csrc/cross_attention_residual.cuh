// The core of absorbed cross_attention_residual, with J = H T columns and w the gate or a number:
//
//   p = softmax over T of (x E^T + c)     a = drop(p)     o = a F + b_o     y = x + w rho o
//
// rho = |x| / (|o| + eps) with norm matching, which makes o twice: once for its norm. Logits wait in float32 in shared
// memory, where four lanes share a head of a row; a row is then rounded in place.
#pragma once

#include <cmath>

#include "bottleneck.cuh"
#include "cross_attention_residual.h"

namespace pyfused {

/// The most columns of a middle, and with norm matching, whose backward has a second sum as wide.
constexpr int kMostColumns = 256, kMostMatched = 128;

/// Where column j of a context's matrix starts.
__device__ inline int64_t offset_of_column(const HeadRows& from, const CrossAttention& p, int64_t context, int j) {
  const int head = j * p.inverse_tokens >> 16;
  return context * from.rows.stride_b + head * from.stride_h + (j - head * p.tokens) * from.rows.stride_l;
}

/// Fetches channels c0 to c0 + kChunk of E or F as a flat tile; 0 beyond the columns and the channels.
template <class B>
__device__ inline void fetch_heads(typename B::T* slot, const HeadRows& from, const CrossAttention& p, int64_t context,
                                   int c0) {
  using T = typename B::T;
  constexpr int kAcross = B::kChunk / 8;
#pragma unroll 2
  for (int i = threadIdx.x; i < B::kNarrow * kAcross; i += B::kThreads) {
    const int j = i / kAcross, c = c0 + i % kAcross * 8;
    const int valid = j < p.columns ? max(0, min(8, p.channels - c)) : 0;
    const T* at = static_cast<const T*>(from.rows.data);
    if (valid > 0) at += offset_of_column(from, p, context, j) + c * from.rows.stride_c;
    T* to = slot + j * B::kFlatPitch + i % kAcross * 8;
    if (from.rows.access == Access::kChannels) {
      cp_async_16(to, at, 2 * valid);
    } else {
      const auto number = [&](int k) -> uint32_t {
        return k < valid ? load_global(at + k * from.rows.stride_c).bits : 0;
      };
      store_shared(reinterpret_cast<uint4*>(to), pairs_of(number));
    }
  }
}

/// c of each column to shared memory.
template <class B>
__device__ inline void load_logits(const BottleneckMemory<B>& memory, const CrossAttention& p, int64_t context) {
  for (int j = threadIdx.x; j < p.columns; j += B::kThreads) {
    const bool given = p.c.rows.data != nullptr;
    store_shared(memory.narrow_bias + j,
                 given ? load_number(p.c.rows.data, p.c.rows.number, offset_of_column(p.c, p, context, j)) : 0.0f);
  }
}

__device__ inline float inverse_or_zero(float x) { return x == 0.0f ? 0.0f : 1.0f / x; }

/// drop(p) of p with its sign.
__device__ inline float dropped(float p, const Dropout& dropout) { return p < 0.0f ? 0.0f : p * dropout.inverse_keep; }

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

/// What dropout keeps in row m of the mask of 16 columns from `column` on, a multiple of 4 or of all tokens; each lane
/// of a quad draws four.
__device__ inline uint32_t kept_columns(const Dropout& dropout, int64_t m, int column) {
  if (dropout.seed == nullptr) return 0xFFFF;
  const int lane = threadIdx.x % 4;
  const uint4 words = philox(static_cast<uint64_t>(load_global(dropout.seed)), column / 4 + lane, m);
  uint32_t kept = (words.x >= dropout.threshold) | (words.y >= dropout.threshold) << 1 |
                  (words.z >= dropout.threshold) << 2 | (words.w >= dropout.threshold) << 3;
  kept <<= 4 * lane;
  kept |= __shfl_xor_sync(0xFFFFFFFFu, kept, 1);
  kept |= __shfl_xor_sync(0xFFFFFFFFu, kept, 2);
  return kept >> column % 4;
}

/// Calls body(row, head, lane) for all heads of the tile, four lanes to each: their numbers lie in different banks.
template <class B, class Body>
__device__ inline void for_heads(const CrossAttention& p, const Body& body) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int i = threadIdx.x / kWarp; i < B::kRows / 8 * p.heads; i += B::kThreads / kWarp) {
    body(i % (B::kRows / 8) * 8 + lane / 4, i / (B::kRows / 8), lane % 4);
  }
}

/// The middle in float32.
template <class B>
__device__ inline float* float_middle(const BottleneckMemory<B>& memory, int row, int column) {
  return reinterpret_cast<float*>(memory.middle + row * B::kMiddlePitch) + column;
}

template <class B>
__device__ inline void put_float_middle(const BottleneckMemory<B>& memory, const float (&sum)[B::kNarrowOwn / 8][4]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < B::kNarrowOwn / 4; ++i) {
    float* at = float_middle(memory, B::first_row() + lane / 4 + i % 2 * 8,
                             B::first_narrow() + i / 2 * 8 + lane % 4 * 2);
    store_shared(reinterpret_cast<float2*>(at), float2{sum[i / 2][i % 2 * 2], sum[i / 2][i % 2 * 2 + 1]});
  }
}

/// Rounds the middle in place, a warp its rows; 0 beyond the columns.
template <class B>
__device__ inline void round_middle(const BottleneckMemory<B>& memory, int columns) {
  const int first = threadIdx.x % kWarp * 2;
#pragma unroll 1
  for (int row = threadIdx.x / kWarp; row < B::kRows; row += B::kThreads / kWarp) {
    float2 pairs[B::kNarrow / 64];
#pragma unroll
    for (int i = 0; i < B::kNarrow / 64; ++i) {
      pairs[i] = load_shared(reinterpret_cast<const float2*>(float_middle(memory, row, first + 64 * i)));
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < B::kNarrow / 64; ++i) {
      const int column = first + 64 * i;
      store_shared(reinterpret_cast<uint32_t*>(memory.middle + row * B::kMiddlePitch + column),
                   pack<typename B::T>(column < columns ? pairs[i].x : 0.0f, column + 1 < columns ? pairs[i].y : 0.0f));
    }
  }
}

/// The middle from p to a, after a barrier; the next one shows it to all.
template <class B>
__device__ inline void drop_middle(const BottleneckMemory<B>& memory, const Dropout& dropout) {
  using T = typename B::T;
#pragma unroll 1
  for (int i = threadIdx.x; i < B::kRows * B::kNarrow / 2; i += B::kThreads) {
    const int row = i / (B::kNarrow / 2), column = i % (B::kNarrow / 2) * 2;
    auto* at = reinterpret_cast<uint32_t*>(memory.middle + row * B::kMiddlePitch + column);
    const uint32_t pair = load_shared(at);
    store_shared(at, pack<T>(dropped(to_float(T{static_cast<uint16_t>(pair)}), dropout),
                             dropped(to_float(T{static_cast<uint16_t>(pair >> 16)}), dropout)));
  }
}

/// This warp's sums of x E^T to p, rounded and with its sign, in the middle.
template <class B>
__device__ inline void put_probabilities(const BottleneckMemory<B>& memory, const float (&sum)[B::kNarrowOwn / 8][4],
                                         const CrossAttention& p, const Tile& tile) {
  put_float_middle(memory, sum);
  __syncthreads();
  for_heads<B>(p, [&](int row, int head, int lane) {
    float* const s = float_middle(memory, row, head * p.tokens);
    const float* const c = memory.narrow_bias + head * p.tokens;
    float top = -INFINITY, total = 0.0f;
#pragma unroll 1
    for (int t = lane; t < p.tokens; t += 4) top = fmaxf(top, load_shared(s + t) + load_shared(c + t));
    top = quad_max(top);
    // A head without keys attends to nothing.
    if (top == -INFINITY) top = 0.0f;
#pragma unroll 1
    for (int t = lane; t < p.tokens; t += 4) {
      const float power = expf(load_shared(s + t) + load_shared(c + t) - top);
      store_shared(s + t, power);
      total += power;
    }
    const float inverse = inverse_or_zero(quad_sum(total));
    const int64_t m = tile.batch * p.length + tile.first + row;
#pragma unroll 1
    for (int first = 0; first < p.tokens; first += 16) {
      const uint32_t kept = kept_columns(p.dropout, m, head * p.padded_tokens + first);
#pragma unroll 1
      for (int t = first + lane; t < min(first + 16, p.tokens); t += 4) {
        const float probability = load_shared(s + t) * inverse;
        store_shared(s + t, kept >> (t - first) & 1 ? probability : -probability);
      }
    }
  });
  __syncthreads();
  round_middle(memory, p.columns);
}

/// o += b_o for this warp's columns of a chunk.
template <class B>
__device__ inline void add_bias(float (&o)[B::kWideOwn / 8][4], const BottleneckMemory<B>& memory, int c0) {
#pragma unroll
  for (int i = 0; i < B::kWideOwn / 8; ++i) {
    const float* at = memory.bias + c0 + B::first_wide() + 8 * i + threadIdx.x % 4 * 2;
    const float2 bias = load_shared(reinterpret_cast<const float2*>(at));
    o[i][0] += bias.x, o[i][1] += bias.y;
    o[i][2] += bias.x, o[i][3] += bias.y;
  }
}

/// Numbers of rows where norms change hands, (kRows) each: behind the tile of o in the staging.
template <class B>
__device__ inline float* row_numbers(const BottleneckMemory<B>& memory, int which) {
  return memory.staging + B::kRows * B::kFlatPitch / 2 + which * B::kRows;
}

/// A thread's sums over its columns of two rows to kColumnWarps arrays from `which` on, each warp's columns in one.
template <class B>
__device__ inline void put_row_sums(const BottleneckMemory<B>& memory, int which, const float (&sum)[2]) {
  const int lane = threadIdx.x % kWarp, column_warp = threadIdx.x / kWarp % B::kColumnWarps;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = quad_sum(sum[half]);
    float* to = row_numbers(memory, which + column_warp) + B::first_row() + lane / 4 + 8 * half;
    if (lane % 4 == 0) store_shared(to, total);
  }
}

template <class B>
__device__ inline float row_sum(const BottleneckMemory<B>& memory, int which, int row) {
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < B::kColumnWarps; ++warp) sum += load_shared(row_numbers(memory, which + warp) + row);
  return sum;
}

/// |x| of each row to `to`, a warp a row: load(numbers, where) reads eight.
template <class B, class Load>
__device__ inline void put_lengths(float* to, const Tile& tile, int channels, const Load& load) {
#pragma unroll 1
  for (int row = threadIdx.x / kWarp; row < B::kRows; row += B::kThreads / kWarp) {
    float square = 0.0f;
    if (row < tile.count) {
#pragma unroll 1
      for (int c = threadIdx.x % kWarp * 8; c < channels; c += kWarp * 8) {
        float x[8];
        const int valid = min(8, channels - c);
        load(x, Eight{row, c, false, valid});
#pragma unroll
        for (int j = 0; j < 8; ++j) square += j < valid ? x[j] * x[j] : 0.0f;
      }
    }
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) square += __shfl_xor_sync(0xFFFFFFFFu, square, lanes);
    if (threadIdx.x % kWarp == 0) store_shared(to + row, sqrtf(square));
  }
}

template <class B>
__global__ void __launch_bounds__(B::kThreads, 1)
    cross_attention_fwd_kernel(const __grid_constant__ CrossAttentionForward p) {
  using T = typename B::T;
  const BottleneckMemory<B> memory(p.channels, p.stages);
  const Tile tile = tile_of(blockIdx.x, B::kRows, p.tiles_l, p.length);
  const int pitch = B::row_pitch(p.channels), chunks = B::chunks(p.channels);
  load_numbers<float>(memory.gate, p.gate, p.channels, chunks * B::kChunk, p.weight);
  load_numbers<T>(memory.bias, p.bias, p.channels, chunks * B::kChunk, 0.0f);
  load_logits(memory, p, tile.batch);
  const auto fetch = [&](int index, int slot) {
    const int c0 = index % chunks * B::kChunk;
    if (index < chunks) {
      load_tile<T, B::kRows, B::kChunk, B::kThreads>(memory.rows + c0, pitch, p.x, tile, c0, p.channels);
    }
    fetch_heads<B>(memory.slots + slot * B::kSlot, index < chunks ? p.e : p.f, p, tile.batch, c0);
  };
  const int before_last = p.norm_match ? 2 * chunks : chunks;
  Pipeline pipeline(before_last + chunks, p.stages, fetch);

  float s[B::kNarrowOwn / 8][4] = {};
  pipeline.run(chunks, [&](int index, int slot) {
    narrow_product<B, false>(s, memory.slots + slot * B::kSlot, memory, index * B::kChunk, p.channels, Unchanged{});
  });
  put_probabilities(memory, s, p, tile);
  if (p.p.data != nullptr) store_middle(memory, p.p, tile, p.columns);
  if (p.dropout.seed != nullptr) {
    __syncthreads();
    drop_middle(memory, p.dropout);
  }

  const bool x_is_here = p.x.number == p.number;
  const auto load_x = [&](float(&x)[8], const Eight& where) {
    if (x_is_here) {
      where.load(x, memory.rows, pitch);
    } else {
      where.load(x, p.x, tile);
    }
  };
  float* const rho = memory.keep;
  if (p.norm_match) {
    float square[2] = {};
    pipeline.run(before_last, [&](int index, int slot) {
      float o[B::kWideOwn / 8][4];
      wide_product<B, false>(o, memory.slots + slot * B::kSlot, memory);
      add_bias(o, memory, (index - chunks) * B::kChunk);
#pragma unroll
      for (const auto& four : o) {
        square[0] += four[0] * four[0] + four[1] * four[1];
        square[1] += four[2] * four[2] + four[3] * four[3];
      }
    });
    put_row_sums(memory, 0, square);
    put_lengths<B>(rho, tile, p.channels, load_x);
    __syncthreads();
    if (threadIdx.x < B::kRows) {
      const float norm = sqrtf(row_sum(memory, 0, threadIdx.x));
      store_shared(rho + threadIdx.x, load_shared(rho + threadIdx.x) * inverse_or_zero(norm + p.eps));
    }
  }

  const auto finish = [&](float (&out)[8], const Eight& where) {
    float x[8], gate[8], bias[8];
    load_x(x, where);
    where.load_of_columns(gate, memory.gate);
    where.load_of_columns(bias, memory.bias);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float matched = p.norm_match ? load_shared(rho + where.row_of(j)) : 1.0f;
      out[j] = x[j] + gate[j] * (matched * (out[j] + bias[j]));
    }
  };
  pipeline.run(before_last + chunks, [&](int index, int slot) {
    float o[B::kWideOwn / 8][4];
    wide_product<B, false>(o, memory.slots + slot * B::kSlot, memory);
    store_chunk<B>(o, memory, p.y, tile, (index - before_last) * B::kChunk, p.channels, finish);
  });
}

}  // namespace pyfused
