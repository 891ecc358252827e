// What remains of cross_attention_residual's backward without rows: gradients out of the sums over rows,
//
//   dF = w G - (K'^T F + k b_o^T)    db_o = w sum rho dy - (k F + k_0 b_o)    dw = rowsum(F G) + b_o sum rho dy
//
// with K' = sum of kappa a^T a, k = sum kappa a and k_0 = sum kappa; without norm matching they are 0.
#pragma once

#include "cross_attention_residual.cuh"

namespace pyfused {

constexpr int kSumThreads = 256;

/// The sum of one float of each of `parts` parts.
__device__ inline float sum_of_floats(const float* from, int parts, int64_t part_size) {
  float sum = 0.0f;
#pragma unroll 4
  for (int part = 0; part < parts; ++part) sum += load_global(from + part * part_size);
  return sum;
}

__global__ void __launch_bounds__(kSumThreads) cross_attention_bwd_sum_kernel(const __grid_constant__ SumOfParts p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, group = i / p.count;
  if (group >= p.groups) return;
  const float* from = p.from + group * p.parts * p.part_size + i % p.count;
  store_number(p.to.data, p.to.number, i, sum_of_floats(from, p.parts, p.part_size));
}

/// Blocks of 8 warps: for each context and 32 channels, then for each context of c and 32 columns.
constexpr int kGradientWarps = 8, kGradientPitch = kWarp + 1;
constexpr int kGradientBytes = 4 * (2 * kWarp * kGradientPitch + 2 * kGradientWarps * kWarp + kWarp);

/// The sum over the warps of each lane's number, for warp 0.
__device__ inline float sum_of_warps(float* numbers, float number) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  store_shared(numbers + warp * kWarp + lane, number);
  __syncthreads();
  float sum = 0.0f;
  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < kGradientWarps; ++i) sum += load_shared(numbers + i * kWarp + lane);
  }
  return sum;
}

__device__ inline void put_logit_gradient(const CrossAttentionGradients& p, int block, float root, float* numbers) {
  const int blocks = (p.columns + kWarp - 1) / kWarp, group = block / blocks;
  const int j = block % blocks * kWarp + threadIdx.x % kWarp;
  float sum = 0.0f;
  if (j < p.columns) {
#pragma unroll 4
    for (int64_t i = threadIdx.x / kWarp; i < p.logit_count; i += kGradientWarps) {
      const int64_t at = (group * p.logit_count + i) * p.logit_parts.stride + j;
      sum += load_number(p.logit_parts.data, p.logit_parts.number, at);
    }
  }
  sum = sum_of_warps(numbers, sum);
  if (threadIdx.x < kWarp && j < p.columns) {
    store_number(p.d_c.data, p.d_c.number, static_cast<int64_t>(group) * p.columns + j, root * sum);
  }
}

/// F of one column at a channel.
__device__ inline float load_f(const CrossAttentionGradients& p, int context, int j, int c) {
  const Rows& f = p.f.rows;
  return load_number(f.data, f.number, offset_of_column(p.f, p, context, j) + c * f.stride_c);
}

__global__ void __launch_bounds__(kGradientWarps* kWarp)
    cross_attention_bwd_gradients_kernel(const __grid_constant__ CrossAttentionGradients p) {
  float* const keys = reinterpret_cast<float*>(shared_memory());  // (32 channels, 32 columns)
  float* const outer = keys + kWarp * kGradientPitch;
  float* const numbers = outer + kWarp * kGradientPitch;  // (2, warps, 32)
  float* const scratch = numbers + 2 * kGradientWarps * kWarp;
  const float root = p.gate.data == nullptr ? p.root : gate_root(p.gate, p.channels, scratch);
  const int channel_blocks = (p.channels + kWarp - 1) / kWarp, block = blockIdx.x;
  if (block >= p.contexts * channel_blocks) {
    return put_logit_gradient(p, block - p.contexts * channel_blocks, root, numbers);
  }
  const int context = block / channel_blocks, c0 = block % channel_blocks * kWarp;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, c = c0 + lane;
  const bool need_keys = p.d_e.data != nullptr, need_values = p.d_f.data != nullptr, exists = c < p.channels;
  const float* const part = p.parts + static_cast<int64_t>(context) * p.splits * p.part_size;
  const int64_t matrix = static_cast<int64_t>(p.channels) * p.pitch;
  const int gram_rows = p.columns + (p.bias.data != nullptr);
  const float* const gram =
      p.gram == nullptr ? nullptr : p.gram + static_cast<int64_t>(context) * gram_rows * p.pitch;
  const float gate = !exists ? 0.0f : p.gate.data == nullptr ? p.weight : load_vector(p.gate, c);
  const float bias = exists && p.bias.data != nullptr ? load_vector(p.bias, c) : 0.0f;
  // G of a wide dy is root times too large; with norm matching sums have been divided by the largest weight of a row.
  const bool weighed = p.largest != nullptr;
  const float outer_scale = (p.wide_dy ? 1.0f / root : 1.0f) * (weighed ? load_global(p.largest) : 1.0f);
  const float gram_scale = root * (weighed ? load_global(p.largest + 1) : 1.0f);

  float d_gate = 0.0f, d_bias = 0.0f;
#pragma unroll 1
  for (int j0 = 0; j0 < p.columns; j0 += kWarp) {
    __syncthreads();
#pragma unroll 1
    for (int i = warp; i < kWarp; i += kGradientWarps) {
      if (c0 + i >= p.channels || j0 + lane >= p.columns) continue;
      const float* at = part + static_cast<int64_t>(c0 + i) * p.pitch + j0 + lane;
      float* to = keys + i * kGradientPitch + lane;
      if (need_keys) store_shared(to, root * sum_of_floats(at, p.splits, p.part_size));
      if (need_values) {
        store_shared(to + (outer - keys), outer_scale * sum_of_floats(at + matrix, p.splits, p.part_size));
      }
    }
    __syncthreads();
    const int j = j0 + 4 * warp;
    if (!exists || j >= p.columns) continue;
    float along[4] = {};  // of columns j to j + 3 in the sum that norm matching takes away
    if (gram != nullptr) {
#pragma unroll 4
      for (int i = 0; i < gram_rows; ++i) {
        const float value = i < p.columns ? load_f(p, context, i, c) : bias;
        const float4 four = load_global(reinterpret_cast<const float4*>(gram + static_cast<int64_t>(i) * p.pitch + j));
        along[0] += four.x * value, along[1] += four.y * value;
        along[2] += four.z * value, along[3] += four.w * value;
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (j + k >= p.columns) continue;
      const int64_t at = (static_cast<int64_t>(context) * p.columns + j + k) * p.channels + c;
      const int here = lane * kGradientPitch + 4 * warp + k;
      if (need_keys) store_number(p.d_e.data, p.d_e.number, at, load_shared(keys + here));
      if (need_values) {
        const float value = load_f(p, context, j + k, c), sum = load_shared(outer + here);
        d_gate += value * sum;
        store_number(p.d_f.data, p.d_f.number, at, gate * sum - gram_scale * along[k]);
        if (gram != nullptr && p.bias.data != nullptr) {
          d_bias -= value * load_global(gram + static_cast<int64_t>(p.columns) * p.pitch + j + k);
        }
      }
    }
  }
  if (!need_values) return;
  d_gate = sum_of_warps(numbers, d_gate);
  d_bias = sum_of_warps(numbers + kGradientWarps * kWarp, d_bias);
  if (warp != 0 || !exists) return;
  const float sum_dy = sum_of_floats(part + 2 * matrix + p.pitch + c, p.splits, p.part_size);
  const int64_t at = static_cast<int64_t>(context) * p.channels + c;
  store_number(p.d_gate.data, p.d_gate.number, at, d_gate + bias * sum_dy);
  if (p.d_bias.data == nullptr) return;
  d_bias *= gram_scale;
  if (gram != nullptr) {
    d_bias -= root * bias * sum_of_floats(p.kappa_sums + static_cast<int64_t>(context) * p.tiles, p.tiles, 1);
  }
  store_number(p.d_bias.data, p.d_bias.number, at, gate * sum_dy + d_bias);
}

}  // namespace pyfused
