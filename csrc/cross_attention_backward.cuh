// Backward of cross_attention_residual over tiles of rows, with g = w dy:
//
//   da = rho g F^T - kappa o F^T     ds = p (dp - sum over T of p dp)     dx = dy + ds E + towards x
//
// pyfused/ops/cross_attention_residual.py has rho, kappa and towards, which is (g . o) / ((|o| + eps) |x|). The sums
// over rows that follow are adapter_residual's, a second time with norm matching, since dF has (kappa a)^T a F. Nothing
// of size (J, J) meets the rows: o and o F^T come out of the tiles of F that g F^T needs anyway.
//
// Gradients of the middle are divided by the root of the largest |w|, and a dy wider than the products is multiplied by
// it: float16 holds neither a w of 1e-6 nor what a scaled loss sends back. For the same reason the matrices that are
// summed over rows, rho a and kappa a, are divided by the largest rho and kappa: |x| / eps where o is next to 0. Those
// are known when all rows are done: a light kernel between rows and sums.
#pragma once

#include "cross_attention_residual.cuh"

namespace pyfused {

/// What norm matching adds up over the channels: o F^T, |o|^2 and dy w . o of a thread's two rows.
template <class B>
struct Matched {
  float product[B::kNarrowOwn / 8][4] = {};
  float square[2] = {}, along[2] = {};

  /// The part of one chunk, whose tile of F is there, as are dy and a.
  __device__ void add(const typename B::T* tile, const BottleneckMemory<B>& memory, int c0, int channels) {
    using T = typename B::T;
    T* const rounded = reinterpret_cast<T*>(memory.staging);  // o, (kRows, kFlatPitch)
    const int lane = threadIdx.x % kWarp, row = B::first_row() + lane / 4;
    float o[B::kWideOwn / 8][4];
    wide_product<B, false>(o, tile, memory);
    add_bias(o, memory, c0);
#pragma unroll
    for (int i = 0; i < B::kWideOwn / 4; ++i) {
      const int half = i % 2, column = B::first_wide() + i / 2 * 8 + lane % 4 * 2;
      const float first = o[i / 2][2 * half], second = o[i / 2][2 * half + 1];
      const float2 gate = load_shared(reinterpret_cast<const float2*>(memory.gate + c0 + column));
      const uint32_t dy = load_shared(reinterpret_cast<const uint32_t*>(
          memory.rows + (row + 8 * half) * B::row_pitch(channels) + c0 + column));
      square[half] += first * first + second * second;
      along[half] += to_float(T{static_cast<uint16_t>(dy)}) * gate.x * first +
                     to_float(T{static_cast<uint16_t>(dy >> 16)}) * gate.y * second;
      store_shared(reinterpret_cast<uint32_t*>(rounded + (row + 8 * half) * B::kFlatPitch + column),
                   pack<T>(first, second));
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < B::kChunk; k += 16) {
      uint32_t a[4];
      load_a(a, rounded, B::kFlatPitch, B::first_row(), k);
      mma_step<T, B::kNarrowOwn / 8, false>(product, a, tile, B::kFlatPitch, B::first_narrow(), k);
    }
  }
};

/// From |x| of each row in `keep`, the sums over channels, and dy w . o too large by `too_large`: rho in `keep`; what x
/// gets times in dx, to narrow_bias; kappa to row_numbers 4.
template <class B>
__device__ inline void put_row_norms(const BottleneckMemory<B>& memory, const CrossAttentionBackwardRows& p,
                                     const Tile& tile, float too_large) {
  __syncthreads();
  if (threadIdx.x < B::kRows) {
    const int row = threadIdx.x;
    const float norm = sqrtf(row_sum(memory, 0, row)), along = row_sum(memory, 2, row) / too_large;
    const float length = load_shared(memory.keep + row);
    const float inverse = inverse_or_zero(norm + p.eps), rho = length * inverse;
    const float kappa = along * rho * inverse * inverse_or_zero(norm);
    store_shared(memory.keep + row, rho);
    store_shared(memory.narrow_bias + row, along * inverse * inverse_or_zero(length));
    store_shared(row_numbers(memory, 4) + row, kappa);
  }
  __syncthreads();
}

/// What `put_row_norms` found, for the sums over the rows of all tiles: rho and kappa of each row, the largest of each
/// in the tile and kappa's sum.
template <class B>
__device__ inline void store_row_weights(const BottleneckMemory<B>& memory, const CrossAttentionBackwardRows& p) {
  // Made anew: kept through the main loop it costs registers that are not there.
  const Tile tile = tile_of(blockIdx.x, B::kRows, p.tiles_l, p.length);
  if (threadIdx.x < tile.count) {
    const int64_t m = tile.batch * p.length + tile.first + threadIdx.x;
    store_global(p.rho + m, load_shared(memory.keep + threadIdx.x));
    store_global(p.kappa + m, load_shared(row_numbers(memory, 4) + threadIdx.x));
  }
  if (threadIdx.x != 0) return;
  float largest_rho = 0.0f, largest_kappa = 0.0f, sum = 0.0f;
#pragma unroll 1
  for (int row = 0; row < tile.count; ++row) {
    const float kappa = load_shared(row_numbers(memory, 4) + row);
    largest_rho = fmaxf(largest_rho, load_shared(memory.keep + row));
    largest_kappa = fmaxf(largest_kappa, fabsf(kappa));
    sum += kappa;
  }
  store_global(p.tile_numbers + blockIdx.x, largest_rho);
  store_global(p.tile_numbers + p.tiles + blockIdx.x, largest_kappa);
  store_global(p.tile_numbers + 2 * p.tiles + blockIdx.x, sum);
}

/// da, in the middle in float32, to ds.
template <class B>
__device__ inline void put_logit_gradients(const BottleneckMemory<B>& memory, const CrossAttentionBackwardRows& p,
                                           const Tile& tile) {
  using T = typename B::T;
  for_heads<B>(p, [&](int row, int head, int lane) {
    float* const da = float_middle(memory, row, head * p.tokens);
    const int64_t at = offset_in(p.p, tile.batch, tile.first + row, head * p.tokens);
    const auto load_p = [&](int t) {
      return row < tile.count ? to_float(load_global(static_cast<const T*>(p.p.data) + at + t)) : 0.0f;
    };
    float sum = 0.0f;
#pragma unroll 1
    for (int t = lane; t < p.tokens; t += 4) sum += dropped(load_p(t), p.dropout) * load_shared(da + t);
    sum = quad_sum(sum);
#pragma unroll 1
    for (int t = lane; t < p.tokens; t += 4) {
      const float probability = load_p(t);
      const float dp = probability < 0.0f ? 0.0f : load_shared(da + t) * p.dropout.inverse_keep;
      store_shared(da + t, fabsf(probability) * (dp - sum));
    }
  });
}

/// a times one number for each row, 1 without `factors`, to the rows of a matrix; `one` stands for a in column J.
__device__ inline void store_weighted(const Rows& to, const float* factors, float one,
                                      const CrossAttentionBackwardRows& p, const Tile& tile) {
  const int groups = static_cast<int>(to.stride_l / 8);
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.count * groups; i += blockDim.x) {
    const int row = i / groups, column = i % groups * 8;
    const float factor = factors == nullptr ? 1.0f : load_shared(factors + row);
    float a[8];
    Eight{row, column, false, max(0, min(8, p.columns - column))}.load(a, p.p, tile);
#pragma unroll
    for (int j = 0; j < 8; ++j) a[j] = factor * (column + j == p.columns ? one : dropped(a[j], p.dropout));
    Eight{row, column, false, 8}.store(a, to, tile);
  }
}

constexpr int kWeighedRows = 64, kWeighThreads = 128;
constexpr int kWeighBytes = 4 * (2 * kWeighedRows + 2 * (kWeighThreads / kWarp));

/// The largest of `count` numbers, for the whole block; `scratch` has a number for each warp.
__device__ inline float largest_of(const float* numbers, int count, float* scratch) {
  float largest = 0.0f;
  for (int i = threadIdx.x; i < count; i += blockDim.x) largest = fmaxf(largest, load_global(numbers + i));
  largest = block_max(largest, scratch);
  return largest == 0.0f ? 1.0f : largest;
}

/// rho a and kappa a, divided by the largest of each, and a with 1 behind it.
template <class T>
__global__ void __launch_bounds__(kWeighThreads)
    cross_attention_bwd_weigh_kernel(const __grid_constant__ CrossAttentionBackwardRows p) {
  float* const factors = reinterpret_cast<float*>(shared_memory());  // (2, kWeighedRows)
  float* const scratch = factors + 2 * kWeighedRows;
  const float rho = largest_of(p.tile_numbers, p.tiles, scratch);
  const float kappa = largest_of(p.tile_numbers + p.tiles, p.tiles, scratch + kWeighThreads / kWarp);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    store_global(p.largest, rho);
    store_global(p.largest + 1, kappa);
  }
  const int tiles_l = static_cast<int>((p.length + kWeighedRows - 1) / kWeighedRows);
  const Tile tile = tile_of(blockIdx.x, kWeighedRows, tiles_l, p.length);
  for (int row = threadIdx.x; row < tile.count; row += blockDim.x) {
    const int64_t m = tile.batch * p.length + tile.first + row;
    store_shared(factors + row, load_global(p.rho + m) / rho);
    store_shared(factors + kWeighedRows + row, load_global(p.kappa + m) / kappa);
  }
  __syncthreads();
  store_weighted(p.matched, factors, 0.0f, p, tile);
  store_weighted(p.left, factors + kWeighedRows, 0.0f, p, tile);
  store_weighted(p.right, nullptr, p.bias.data == nullptr ? 0.0f : 1.0f, p, tile);
}

/// p of a tile of rows out of x, to memory.
template <class B>
__device__ inline void make_probabilities(const BottleneckMemory<B>& memory, const CrossAttentionBackwardRows& p,
                                          const Tile& tile) {
  using T = typename B::T;
  const int chunks = B::chunks(p.channels);
  load_logits(memory, p, tile.batch);
  const auto fetch = [&](int index, int slot) {
    const int c0 = index * B::kChunk;
    load_tile<T, B::kRows, B::kChunk, B::kThreads>(memory.rows + c0, B::row_pitch(p.channels), p.x, tile, c0,
                                                   p.channels);
    fetch_heads<B>(memory.slots + slot * B::kSlot, p.e, p, tile.batch, c0);
  };
  Pipeline pipeline(chunks, p.stages, fetch);
  float s[B::kNarrowOwn / 8][4] = {};
  pipeline.run(chunks, [&](int index, int slot) {
    narrow_product<B, false>(s, memory.slots + slot * B::kSlot, memory, index * B::kChunk, p.channels, Unchanged{});
  });
  put_probabilities(memory, s, p, tile);
  store_middle(memory, p.p, tile, p.pitch);
}

template <class B>
__global__ void __launch_bounds__(B::kThreads, 1)
    cross_attention_bwd_rows_kernel(const __grid_constant__ CrossAttentionBackwardRows p) {
  using T = typename B::T;
  const BottleneckMemory<B> memory(p.channels, p.stages);
  const Tile tile = tile_of(blockIdx.x, B::kRows, p.tiles_l, p.length);
  const int pitch = B::row_pitch(p.channels), chunks = B::chunks(p.channels);
  const bool matches = B::kNarrow <= kMostMatched && p.norm_match;
  if (blockIdx.x == 0 && threadIdx.x == 0 && p.gate_copy != nullptr) store_global(p.gate_copy, p.weight);
  if (p.recompute) make_probabilities(memory, p, tile);
  if (matches) {
    if (!p.recompute) {
      load_tile<T, B::kRows, B::kNarrow, B::kThreads>(memory.middle, B::kMiddlePitch, p.p, tile, 0, p.columns);
      cp_async_commit();
      cp_async_wait<0>();
    }
    __syncthreads();
    drop_middle(memory, p.dropout);
    load_numbers<T>(memory.bias, p.bias, p.channels, chunks * B::kChunk, 0.0f);
    put_lengths<B>(memory.keep, tile, p.channels, [&](float(&x)[8], const Eight& where) { where.load(x, p.x, tile); });
  }
  const float root = p.gate.data == nullptr ? p.root : gate_root(p.gate, p.channels, memory.scratch);
  const float dy_scale = p.dy.number == Number::kFloat32 ? root : 1.0f;
  load_numbers<float>(memory.gate, p.gate, p.channels, chunks * B::kChunk, p.weight);
  const auto fetch = [&](int index, int slot) {
    const int c0 = index % chunks * B::kChunk;
    if (index < chunks) {
      load_tile<T, B::kRows, B::kChunk, B::kThreads>(memory.rows + c0, pitch, p.dy, tile, c0, p.channels, AllRows{},
                                                     dy_scale);
    }
    fetch_heads<B>(memory.slots + slot * B::kSlot, index < chunks ? p.f : p.e, p, tile.batch, c0);
  };
  Pipeline pipeline(p.dx.data == nullptr ? chunks : 2 * chunks, p.stages, fetch);

  const float factor = 1.0f / root / dy_scale;
  const auto gated = [&](uint32_t (&a)[4], int c) {
    if (p.gate.data == nullptr) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto* at = memory.gate + c + threadIdx.x % 4 * 2 + i / 2 * 8;
      const float2 gate = load_shared(reinterpret_cast<const float2*>(at));
      a[i] = pack<T>(to_float(T{static_cast<uint16_t>(a[i])}) * (gate.x * factor),
                     to_float(T{static_cast<uint16_t>(a[i] >> 16)}) * (gate.y * factor));
    }
  };
  float da[B::kNarrowOwn / 8][4] = {};
  Matched<B> matched;
  pipeline.run(chunks, [&](int index, int slot) {
    const T* const f = memory.slots + slot * B::kSlot;
    narrow_product<B, false>(da, f, memory, index * B::kChunk, p.channels, gated);
    if (matches) matched.add(f, memory, index * B::kChunk, p.channels);
  });
  if (p.gate.data == nullptr) {
#pragma unroll
    for (auto& four : da) {
#pragma unroll
      for (float& number : four) number *= p.weight * factor;
    }
  }
  if (matches) {
    put_row_sums(memory, 0, matched.square);
    put_row_sums(memory, 2, matched.along);
    put_row_norms(memory, p, tile, root * dy_scale);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = B::first_row() + threadIdx.x % kWarp / 4 + 8 * half;
      const float rho = load_shared(memory.keep + row), kappa = load_shared(row_numbers(memory, 4) + row);
#pragma unroll
      for (int i = 0; i < B::kNarrowOwn / 8; ++i) {
#pragma unroll
        for (int j = 2 * half; j < 2 * half + 2; ++j) da[i][j] = rho * da[i][j] - kappa * matched.product[i][j];
      }
    }
  }
  put_float_middle(memory, da);
  __syncthreads();
  if (p.rho != nullptr) store_row_weights(memory, p);
  put_logit_gradients(memory, p, tile);
  __syncthreads();
  round_middle(memory, p.columns);
  if (p.ds.data != nullptr) store_middle(memory, p.ds, tile, p.pitch);
  if (p.matched.data != nullptr && !matches) store_weighted(p.matched, nullptr, 0.0f, p, tile);
  if (p.dx.data == nullptr) return;

  const auto finish = [&](float (&out)[8], const Eight& where) {
    float dy[8], x[8];
    if (p.dy.number == p.number) {
      where.load(dy, memory.rows, pitch);
    } else {
      where.load(dy, p.dy, tile);
    }
    if (matches) where.load(x, p.x, tile);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (matches) out[j] += load_shared(memory.narrow_bias + where.row_of(j)) * x[j];
      out[j] = out[j] * root + dy[j];
    }
  };
  pipeline.run(2 * chunks, [&](int index, int slot) {
    float out[B::kWideOwn / 8][4];
    wide_product<B, false>(out, memory.slots + slot * B::kSlot, memory);
    store_chunk<B>(out, memory, p.dx, tile, (index - chunks) * B::kChunk, p.channels, finish);
  });
}

}  // namespace pyfused
