// adapter_residual:
//
//   y = r + k gamma * (skip z + a U^T + u)         a = drop(phi(h)), h = z D^T + d
//   dh = k mask phi'(h) * (dy (gamma U)) / (1 - p)     dz = dh D + skip k gamma dy, plus dy if z is the residual
//   dD = dh^T z    dd = sum dh    G = k dy^T a    dU = gamma G    du = gamma sum k dy
//   dgamma = skip sum k dy z + rowsum(U G) + u sum k dy
//
// Forward is one launch, backward three: rows, sums over rows in parts, and the gradients out of the parts. dh is kept
// divided by the root of the largest |gamma|, and a dy wider than the products multiplied by it: float16 holds neither
// a gamma of 1e-6 nor what a scaled loss sends back.
#pragma once

#include "activation.cuh"
#include "adapter_residual.h"
#include "bottleneck.cuh"

namespace pyfused {

/// Fetches chunk `c0` of D (h, C) as a flat tile, or of U (C, h) as a tall one.
template <class B>
__device__ inline void fetch_down(typename B::T* slot, const Adapter& p, int c0) {
  load_tile<typename B::T, B::kNarrow, B::kChunk, B::kThreads>(slot, B::kFlatPitch, p.down, Tile{0, 0, p.width}, c0,
                                                               p.channels);
}
template <class B>
__device__ inline void fetch_up(typename B::T* slot, const Adapter& p, int c0) {
  load_tile<typename B::T, B::kChunk, B::kNarrow, B::kThreads>(slot, B::kTallPitch, p.up, Tile{0, c0, p.channels - c0},
                                                               0, p.width);
}

/// h += d.
template <class B>
__device__ inline void add_down_bias(float (&h)[B::kNarrowOwn / 8][4], const BottleneckMemory<B>& memory) {
#pragma unroll
  for (int i = 0; i < B::kNarrowOwn / 8; ++i) {
    const auto* at = memory.narrow_bias + B::first_narrow() + 8 * i + threadIdx.x % 4 * 2;
    const float2 bias = load_shared(reinterpret_cast<const float2*>(at));
    h[i][0] += bias.x, h[i][1] += bias.y;
    h[i][2] += bias.x, h[i][3] += bias.y;
  }
}

/// `kept_elements` of this thread's part of the middle.
template <class B>
__device__ inline uint64_t kept_middle(const Dropout& dropout, const Tile& tile, int64_t length) {
  const int64_t m = tile.batch * length + tile.first + B::first_row() + threadIdx.x % kWarp / 4;
  return kept_elements(dropout, m, B::first_narrow(), B::kNarrowOwn / 8);
}

template <class B>
__global__ void __launch_bounds__(B::kThreads, 1) adapter_fwd_kernel(const __grid_constant__ AdapterForward p) {
  using T = typename B::T;
  const BottleneckMemory<B> memory(p.channels, p.stages);
  const Tile tile = tile_of(blockIdx.x, B::kRows, p.tiles_l, p.length);
  const bool live = SampleScale{p.sample_scale, p.per_sample}.load<B::kRows>(memory.keep, tile, p.length);
  if (!live) {
    copy_rows(p.residual, p.y, tile, p.channels);
    if (p.hidden.data != nullptr) copy_rows(Rows{}, p.hidden, tile, p.width);
    return;
  }
  const int pitch = B::row_pitch(p.channels), chunks = B::chunks(p.channels);
  load_numbers<float>(memory.gate, p.gamma, p.channels, chunks * B::kChunk, 1.0f);
  load_numbers<T>(memory.bias, p.up_bias, p.channels, chunks * B::kChunk, 0.0f);
  load_numbers<T>(memory.narrow_bias, p.down_bias, p.width, B::kNarrow, 0.0f);
  const auto fetch = [&](int index, int slot) {
    const int c0 = index % chunks * B::kChunk;
    T* to = memory.slots + slot * B::kSlot;
    if (index < chunks) {
      load_tile<T, B::kRows, B::kChunk, B::kThreads>(memory.rows + c0, pitch, p.z, tile, c0, p.channels,
                                                     KeptRows{memory.keep});
      fetch_down<B>(to, p, c0);
    } else {
      fetch_up<B>(to, p, c0);
    }
  };
  Pipeline pipeline(2 * chunks, p.stages, fetch);

  float h[B::kNarrowOwn / 8][4] = {};
  pipeline.run(chunks, [&](int index, int slot) {
    narrow_product<B, false>(h, memory.slots + slot * B::kSlot, memory, index * B::kChunk, p.channels, Unchanged{});
  });
  add_down_bias<B>(h, memory);
  if (p.hidden.data != nullptr) {
    put_middle(memory, h);
    store_middle(memory, p.hidden, tile, p.width);
    __syncthreads();
  }
  const uint64_t kept = kept_middle<B>(p.dropout, tile, p.length);
  with_family(p.activation, [&](auto family) {
#pragma unroll
    for (int i = 0; i < B::kNarrowOwn / 2; ++i) {
      float& number = h[i / 4][i % 4];
      number = kept >> i & 1 ? activate<family.value>(p.activation, number).value * p.dropout.inverse_keep : 0.0f;
    }
  });
  put_middle(memory, h);

  // A dropped row of z is the residual too, whatever it holds: shared memory has zeros there.
  const bool residual_is_here = p.z_is_residual && p.sample_scale.data == nullptr;
  const auto finish = [&](float (&out)[8], const Eight& where) {
    float z[8], r[8], gamma[8], bias[8];
    where.load(z, memory.rows, pitch);
    where.load_of_columns(gamma, memory.gate);
    where.load_of_columns(bias, memory.bias);
    if (!residual_is_here) where.load(r, p.residual, tile);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float branch = gamma[j] * (out[j] + bias[j] + p.skip * z[j]), residual = residual_is_here ? z[j] : r[j];
      const float keep = load_shared(memory.keep + where.row_of(j));
      out[j] = keep == 0.0f ? residual : keep * branch + residual;
    }
  };
  pipeline.run(2 * chunks, [&](int index, int slot) {
    float out[B::kWideOwn / 8][4];
    wide_product<B, true>(out, memory.slots + slot * B::kSlot, memory);
    store_chunk<B>(out, memory, p.y, tile, (index - chunks) * B::kChunk, p.channels, finish);
  });
}

template <class B>
__global__ void __launch_bounds__(B::kThreads, 1)
    adapter_bwd_rows_kernel(const __grid_constant__ AdapterBackwardRows p) {
  using T = typename B::T;
  const BottleneckMemory<B> memory(p.channels, p.stages);
  const Tile tile = tile_of(blockIdx.x, B::kRows, p.tiles_l, p.length);
  if (!SampleScale{p.sample_scale, p.per_sample}.load<B::kRows>(memory.keep, tile, p.length)) {
    if (p.dz.data != nullptr) copy_rows(p.z_is_residual ? p.dy : Rows{}, p.dz, tile, p.channels);
    return;
  }
  const KeptRows kept{memory.keep};
  const int pitch = B::row_pitch(p.channels), chunks = B::chunks(p.channels);
  float dh[B::kNarrowOwn / 8][4] = {};
  if (p.hidden.data == nullptr) {
    load_numbers<T>(memory.narrow_bias, p.down_bias, p.width, B::kNarrow, 0.0f);
    const auto fetch = [&](int index, int slot) {
      const int c0 = index * B::kChunk;
      load_tile<T, B::kRows, B::kChunk, B::kThreads>(memory.rows + c0, pitch, p.z, tile, c0, p.channels, kept);
      fetch_down<B>(memory.slots + slot * B::kSlot, p, c0);
    };
    Pipeline pipeline(chunks, p.stages, fetch);
    pipeline.run(chunks, [&](int index, int slot) {
      narrow_product<B, false>(dh, memory.slots + slot * B::kSlot, memory, index * B::kChunk, p.channels, Unchanged{});
    });
    add_down_bias<B>(dh, memory);
    put_middle(memory, dh);
#pragma unroll
    for (auto& four : dh) four[0] = four[1] = four[2] = four[3] = 0.0f;
    __syncthreads();
  } else {
    load_tile<T, B::kRows, B::kNarrow, B::kThreads>(memory.middle, B::kTallPitch, p.hidden, tile, 0, p.width, kept);
  }
  const float root = gate_root(p.gamma, p.channels, memory.scratch);
  const float dy_scale = p.dy.number == Number::kFloat32 ? root : 1.0f;
  load_numbers<float>(memory.gate, p.gamma, p.channels, chunks * B::kChunk, 1.0f);
  const auto fetch = [&](int index, int slot) {
    const int c0 = index % chunks * B::kChunk;
    T* to = memory.slots + slot * B::kSlot;
    if (index < chunks) {
      load_tile<T, B::kRows, B::kChunk, B::kThreads>(memory.rows + c0, pitch, p.dy, tile, c0, p.channels, kept,
                                                     dy_scale);
      fetch_up<B>(to, p, c0);
    } else {
      fetch_down<B>(to, p, c0);
    }
  };
  Pipeline pipeline(p.dz.data == nullptr ? chunks : 2 * chunks, p.stages, fetch);

  const auto gated = [&](uint32_t (&a)[4], int c) {
    if (p.gamma.data == nullptr) return;
    const float factor = 1.0f / root / dy_scale;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto* at = memory.gate + c + threadIdx.x % 4 * 2 + i / 2 * 8;
      const float2 gate = load_shared(reinterpret_cast<const float2*>(at));
      a[i] = pack<T>(to_float(T{static_cast<uint16_t>(a[i])}) * (gate.x * factor),
                     to_float(T{static_cast<uint16_t>(a[i] >> 16)}) * (gate.y * factor));
    }
  };
  pipeline.run(chunks, [&](int index, int slot) {
    narrow_product<B, true>(dh, memory.slots + slot * B::kSlot, memory, index * B::kChunk, p.channels, gated);
  });

  const uint64_t drawn = kept_middle<B>(p.dropout, tile, p.length);
  const float keep[2] = {load_shared(memory.keep + B::first_row() + threadIdx.x % kWarp / 4),
                         load_shared(memory.keep + B::first_row() + threadIdx.x % kWarp / 4 + 8)};
  with_family(p.activation, [&](auto family) {
    T* at = own_middle(memory);
#pragma unroll
    for (int i = 0; i < B::kNarrowOwn / 4; ++i) {
      // h makes room for k a.
      auto* pair = reinterpret_cast<uint32_t*>(at + i / 2 * 8 + i % 2 * 8 * B::kTallPitch);
      const uint32_t h = load_shared(pair);
      float activated[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& t = dh[i / 2][i % 2 * 2 + j];
        const float by = drawn >> (2 * i + j) & 1 ? p.dropout.inverse_keep * keep[i % 2] : 0.0f;
        const auto phi = activate<family.value>(p.activation, to_float(T{static_cast<uint16_t>(h >> 16 * j)}));
        activated[j] = by == 0.0f ? 0.0f : by * phi.value;
        t = by == 0.0f ? 0.0f : t * by * phi.slope;
      }
      store_shared(pair, pack<T>(activated[0], activated[1]));
    }
  });
  if (p.activated.data != nullptr) {
    store_middle(memory, p.activated, tile, p.pitch);
    __syncthreads();
  }
  put_middle(memory, dh);
  if (p.dh.data != nullptr) store_middle(memory, p.dh, tile, p.pitch);
  if (p.dz.data == nullptr) return;

  const auto finish = [&](float (&out)[8], const Eight& where) {
    float dy[8], whole[8], gamma[8];
    where.load(dy, memory.rows, pitch);
    where.load_of_columns(gamma, memory.gate);
    // Dropped rows are zeros in shared memory.
    if (p.z_is_residual && p.sample_scale.data != nullptr) where.load(whole, p.dy, tile);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float keep = load_shared(memory.keep + where.row_of(j));
      const float residual = !p.z_is_residual ? 0.0f : p.sample_scale.data != nullptr ? whole[j] : dy[j];
      const float branch = out[j] * root + p.skip * keep * gamma[j] * (dy[j] / dy_scale);
      out[j] = keep == 0.0f ? residual : branch + residual;
    }
  };
  pipeline.run(2 * chunks, [&](int index, int slot) {
    float out[B::kWideOwn / 8][4];
    wide_product<B, false>(out, memory.slots + slot * B::kSlot, memory);
    store_chunk<B>(out, memory, p.dz, tile, (index - chunks) * B::kChunk, p.channels, finish);
  });
}

/// The sum of one float of every part.
__device__ inline float sum_of_parts(const AdapterGradients& p, int64_t at) {
  float sum = 0.0f;
#pragma unroll 4
  for (int split = 0; split < p.sums.splits; ++split) {
    sum += load_global(p.sums.parts + split * p.sums.part_size + at);
  }
  return sum;
}

/// One warp for each channel, then one for each 32 columns of dd.
template <class T>
__global__ void __launch_bounds__(128, 1) adapter_bwd_gradients_kernel(const __grid_constant__ AdapterGradients p) {
  const float root = gate_root(p.gamma, p.channels, reinterpret_cast<float*>(shared_memory()));
  const int warp = blockIdx.x * 4 + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t vectors = 2 * static_cast<int64_t>(p.channels) * p.sums.pitch;
  if (warp >= p.channels) {
    const int h = (warp - p.channels) * kWarp + lane;
    if (h < p.width && p.d_down_bias.data != nullptr) {
      store_number(p.d_down_bias.data, p.d_down_bias.number, h, root * sum_of_parts(p, vectors + h));
    }
    return;
  }
  const int c = warp;
  const float gamma = p.gamma.data == nullptr ? 1.0f : load_vector(p.gamma, c);
  // G of a wide dy is root times too large.
  const float outer_scale = p.sums.dy.number == Number::kFloat32 ? 1.0f / root : 1.0f;
  float d_gamma = 0.0f;
  for (int h = lane; h < p.width; h += kWarp) {
    const int64_t at = static_cast<int64_t>(c) * p.sums.pitch + h;
    if (p.d_down.data != nullptr) {
      store_number(p.d_down.data, p.d_down.number, static_cast<int64_t>(h) * p.channels + c, root * sum_of_parts(p, at));
    }
    if (p.d_up.data != nullptr) {
      const float outer = outer_scale * sum_of_parts(p, static_cast<int64_t>(p.channels) * p.sums.pitch + at);
      store_number(p.d_up.data, p.d_up.number, static_cast<int64_t>(c) * p.width + h, gamma * outer);
      const float up = load_number(p.up.data, p.up.number, c * p.up.stride_l + h * p.up.stride_c);
      d_gamma += outer * to_float(from_float<T>(up));
    }
  }
  if (p.d_up.data == nullptr) return;
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) d_gamma += __shfl_xor_sync(0xFFFFFFFFu, d_gamma, lanes);
  if (lane != 0) return;
  const float sum_dy = sum_of_parts(p, vectors + p.sums.pitch + c);
  if (p.sums.z.data != nullptr) d_gamma += p.skip * sum_of_parts(p, vectors + p.sums.pitch + p.channels + c);
  if (p.up_bias.data != nullptr) {
    d_gamma += sum_dy * to_float(from_float<T>(load_vector(p.up_bias, c)));
    store_number(p.d_up_bias.data, p.d_up_bias.number, c, gamma * sum_dy);
  }
  store_global(p.d_gamma + c, d_gamma);
}

}  // namespace pyfused
