// Sums over rows of the bottleneck family: wide rows times rows of the middle, and the sums of both.
#pragma once

#include "bottleneck.cuh"
#include "row_sums.h"

namespace pyfused {

/// A step of the sums over rows: 64 rows of 64 channels and kHidden columns of the middle, in 4 warps of 32 channels by
/// half of the columns each.
template <class T_, int kHidden_>
struct RowSumsStep {
  using T = T_;
  static constexpr int kHidden = kHidden_, kRows = 64, kChannels = 64, kThreads = 128;
  static constexpr int kPitch = tile_pitch(kChannels), kHiddenPitch = tile_pitch(kHidden);
  static constexpr int kSlot = 2 * kRows * (kPitch + kHiddenPitch);
  static constexpr int shared_bytes(int stages) { return stages * (2 * kSlot + 4 * kRows) + 4 * kWarp; }
};

/// sum (32 channels, kHidden / 2 columns of this warp) += wide^T middle over the rows of one step.
template <class S>
__device__ inline void add_outer(float (&sum)[2][S::kHidden / 16][4], const typename S::T* wide,
                                 const typename S::T* middle) {
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int k = 0; k < S::kRows; k += 16) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t a[4];
      load_a_trans(a, wide, S::kPitch, warp % 2 * 32 + 16 * i, k);
      mma_step<typename S::T, S::kHidden / 16, true>(sum[i], a, middle, S::kHiddenPitch, warp / 2 * (S::kHidden / 2),
                                                     k);
    }
  }
}

template <class S>
__device__ inline void store_outer(float* to, const float (&sum)[2][S::kHidden / 16][4], int c0, int h0,
                                   const RowSums& p) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int c = c0 + warp % 2 * 32 + lane / 4 + 8 * i;
#pragma unroll
    for (int j = 0; j < S::kHidden / 16; ++j) {
      const int h = h0 + warp / 2 * (S::kHidden / 2) + 8 * j + lane % 4 * 2;
      if (c >= p.channels || h >= p.pitch) continue;
      const float* two = sum[i / 2][j] + i % 2 * 2;
      store_global(reinterpret_cast<float2*>(to + static_cast<int64_t>(c) * p.pitch + h), float2{two[0], two[1]});
    }
  }
}

template <class T, int kHidden>
__global__ void __launch_bounds__(128, 1) row_sums_kernel(const __grid_constant__ RowSums p) {
  using S = RowSumsStep<T, kHidden>;
  T* const slots = reinterpret_cast<T*>(shared_memory());
  float* const keeps = reinterpret_cast<float*>(slots + p.stages * S::kSlot);  // (stages, kRows)
  float* const scratch = keeps + p.stages * S::kRows;
  const int c0 = blockIdx.x * S::kChannels, h0 = blockIdx.y * S::kHidden;
  const SampleScale scale{p.sample_scale, p.per_sample};
  const bool need_z = p.z.data != nullptr;
  const float dy_scale = p.dy.number == Number::kFloat32 ? gate_root(p.gamma, p.channels, scratch) : 1.0f;
  const int64_t tiles = p.batch * p.tiles_l, first = tiles * blockIdx.z / p.splits;
  const int steps = static_cast<int>(tiles * (blockIdx.z + 1) / p.splits - first);

  // Slots, a bit each, whose rows all belong to dropped samples.
  unsigned dropped = 0;
  const auto fetch = [&](int step, int slot) {
    const Tile tile = tile_of(first + step, S::kRows, p.tiles_l, p.length);
    float* const keep = keeps + slot * S::kRows;
    dropped &= ~(1u << slot);
    if (!scale.load<S::kRows>(keep, tile, p.length)) {
      dropped |= 1u << slot;
      return;
    }
    const KeptRows kept{keep};
    T* const z = slots + slot * S::kSlot;
    T *const dy = z + S::kRows * S::kPitch, *const dh = dy + S::kRows * S::kPitch,
      *const a = dh + S::kRows * S::kHiddenPitch;
    if (need_z) load_tile<T, S::kRows, S::kChannels, S::kThreads>(z, S::kPitch, p.z, tile, c0, p.channels, kept);
    if (p.need_down) {
      load_tile<T, S::kRows, kHidden, S::kThreads>(dh, S::kHiddenPitch, p.dh, tile, h0, p.pitch, kept);
    }
    if (p.need_up) {
      load_tile<T, S::kRows, S::kChannels, S::kThreads>(dy, S::kPitch, p.dy, tile, c0, p.channels, kept, dy_scale);
      load_tile<T, S::kRows, kHidden, S::kThreads>(a, S::kHiddenPitch, p.activated, tile, h0, p.pitch, kept);
    }
  };
  Pipeline pipeline(steps, p.stages, fetch);

  float down[2][kHidden / 16][4] = {}, outer[2][kHidden / 16][4] = {};
  // Of one column in half of the rows each.
  float sum_dh = 0.0f, sum_dy = 0.0f, sum_dyz = 0.0f;
  const int column = threadIdx.x % 64, half = threadIdx.x / 64 * 32;
  pipeline.run(steps, [&](int, int slot) {
    if (dropped >> slot & 1) return;
    const float* const keep = keeps + slot * S::kRows;
    const T* const z = slots + slot * S::kSlot;
    const T *const dy = z + S::kRows * S::kPitch, *const dh = dy + S::kRows * S::kPitch,
            *const a = dh + S::kRows * S::kHiddenPitch;
    if (p.need_down) {
      if (need_z) add_outer<S>(down, z, dh);
      if (blockIdx.x == 0 && threadIdx.x < kHidden) {
#pragma unroll 8
        for (int row = 0; row < S::kRows; ++row) {
          sum_dh += to_float(load_shared(dh + row * S::kHiddenPitch + threadIdx.x));
        }
      }
    }
    if (p.need_up) {
      add_outer<S>(outer, dy, a);
      if (blockIdx.y == 0) {
#pragma unroll 8
        for (int row = half; row < half + 32; ++row) {
          const float g = load_shared(keep + row) * to_float(load_shared(dy + row * S::kPitch + column));
          sum_dy += g;
          if (need_z) sum_dyz += g * to_float(load_shared(z + row * S::kPitch + column));
        }
      }
    }
  });

  float* const part = p.parts + blockIdx.z * p.part_size;
  float* const vectors = part + 2 * static_cast<int64_t>(p.channels) * p.pitch;
  if (p.need_down) {
    store_outer<S>(part, down, c0, h0, p);
    const int h = h0 + threadIdx.x;
    if (blockIdx.x == 0 && threadIdx.x < kHidden && h < p.pitch) store_global(vectors + h, sum_dh);
  }
  if (p.need_up) {
    store_outer<S>(part + static_cast<int64_t>(p.channels) * p.pitch, outer, c0, h0, p);
    if (blockIdx.y == 0) {
      // The second half of the rows joins the first.
      float* const halves = reinterpret_cast<float*>(slots);
      __syncthreads();
      if (half != 0) {
        store_shared(halves + column, sum_dy);
        store_shared(halves + 64 + column, sum_dyz);
      }
      __syncthreads();
      const int c = c0 + column;
      if (half == 0 && c < p.channels) {
        store_global(vectors + p.pitch + c, (sum_dy + load_shared(halves + column)) / dy_scale);
        store_global(vectors + p.pitch + p.channels + c, (sum_dyz + load_shared(halves + 64 + column)) / dy_scale);
      }
    }
  }
}

}  // namespace pyfused
