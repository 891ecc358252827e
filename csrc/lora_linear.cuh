// lora_linear: y = x W^T + b + s P B^T, where every tile of y makes its own P = drop(x) A^T from the tiles of x that it
// holds anyway; and the sums over rows of dA and dB.
#pragma once

#include "lora_linear.h"
#include "mma.cuh"
#include "philox.cuh"
#include "tiles.cuh"

namespace pyfused {

/// A block's tile of y is (kM, kN), made in steps of kK. Its warps share bands of 16 kWarpsN rows, kWarpsN to a band,
/// and each makes 16 rows of P. W's tiles have K along their rows, or with kFlipped down them.
template <class T_, int kM_, int kN_, int kWarpsN_, int kRank_, bool kFlipped_>
struct GemmTile {
  using T = T_;
  static constexpr int kM = kM_, kN = kN_, kK = 32, kStages = 4, kRank = kRank_;
  static constexpr bool kFlipped = kFlipped_;
  static constexpr int kWarpsN = kWarpsN_, kThreads = kM / 16 * kWarp;
  static constexpr int kColumns = kN / kWarpsN;  // of a warp
  // Left alone, the compiler spills a few registers for one more block.
  static constexpr int kBlocks = kThreads == 128 ? 3 : 1;

  // The ring of stages holds x, W and A; after the last step P and y take its place. B and the bias stay.
  static constexpr int kPitch = tile_pitch(kK), kWPitch = kFlipped ? tile_pitch(kN) : kPitch;
  static constexpr int kW = kM * kPitch, kA = kW + (kFlipped ? kK : kN) * kWPitch, kStage = kA + kRank * kPitch;
  static constexpr int kPPitch = tile_pitch(kRank), kYPitch = tile_pitch(kN), kY = kM * kPPitch;
  static constexpr int kB = kStages * kStage, kBias = kB + kN * kPPitch;
  static constexpr int kSharedBytes = 2 * kBias + 4 * kN;
  static_assert(kY + kM * kYPitch <= kB && kColumns <= 64);
};

/// What a warp adds up: its part of y, and its 16 rows of P.
template <class G>
struct GemmSums {
  float y[G::kWarpsN][G::kColumns / 8][4];
  float p[G::kRank / 8][4];
};

/// Dropout of a block whose first row is `row`.
struct Mask {
  uint64_t seed;
  uint32_t threshold;
  int64_t row;

  __device__ uint32_t kept(uint32_t quad, int64_t from) const {
    const uint4 words = philox(seed, quad, row + from);
    return (words.x >= threshold) | (words.y >= threshold) << 1 | (words.z >= threshold) << 2 |
           (words.w >= threshold) << 3;
  }

  /// What is kept of a block (16, 16) at (from, column), in bits 2 i and 2 i + 1 for register i of an A fragment.
  __device__ uint32_t kept_16x16(int from, int column) const {
    const int lane = threadIdx.x % kWarp, odd = lane % 2;
    // Two neighbouring lanes hold halves of the same quads: each draws those of one row for both.
    const uint32_t quad = column / 4 + lane % 4 / 2, drawn = from + lane / 4 + 8 * odd;
    const uint32_t mine = kept(quad, drawn) | kept(quad + 2, drawn) << 4;
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFF, mine, 1);
    const uint32_t low = (odd ? other : mine) >> 2 * odd, high = (odd ? mine : other) >> 2 * odd;
    return (low & 3) | (high & 3) << 2 | (low & 0x30) | (high & 0x30) << 2;
  }
};

/// The bits of two 16-bit numbers, each as bits 0 and 1 of `kept` say.
__device__ inline uint32_t kept_pair(uint32_t kept) {
  return (kept & 1 ? 0xFFFFu : 0u) | (kept & 2 ? 0xFFFF0000u : 0u);
}

/// The tiles of x and W along K.
template <class G>
class Operands {
 public:
  using T = typename G::T;

  __device__ Operands(const LoraGemm& g, const Tile& tile, int n0)
      : g_(g),
        tile_(tile),
        n0_(n0),
        x_(copied_first<T, G::kK>(g.x, tile, 0)),
        w_(copied_first<T, kAcross>(g.weight, rows(), c0())) {}

  /// The next two tiles, under way to their places in a stage.
  __device__ void fetch(T* stage) {
    load_tile_at<T, G::kM, G::kK, G::kThreads>(stage, G::kPitch, g_.x, tile_, k0_, g_.k, x_);
    load_tile_at<T, kDown, kAcross, G::kThreads>(stage + G::kW, G::kWPitch, g_.weight, rows(), c0(),
                                                 G::kFlipped ? g_.n : g_.k, w_);
    k0_ += G::kK;
    x_ += G::kK * g_.x.stride_c;
    w_ += G::kK * (G::kFlipped ? g_.weight.stride_l : g_.weight.stride_c);
  }

 private:
  static constexpr int kDown = G::kFlipped ? G::kK : G::kN, kAcross = G::kFlipped ? G::kN : G::kK;  // W's tile

  __device__ Tile rows() const {
    return G::kFlipped ? Tile{0, k0_, min(G::kK, g_.k - k0_)} : Tile{0, n0_, min(G::kN, g_.n - n0_)};
  }
  __device__ int c0() const { return G::kFlipped ? n0_ : k0_; }

  const LoraGemm& g_;
  const Tile& tile_;
  const int n0_;
  int k0_ = 0;
  const T *x_, *w_;
};

/// sums += the products of one stage, whose first column is k0.
template <class G>
__device__ inline void multiply(GemmSums<G>& sums, const typename G::T* stage, const Mask& mask, bool drop_x, int k0,
                                int rank) {
  using T = typename G::T;
  const int warp = threadIdx.x / kWarp, band = warp / G::kWarpsN * G::kWarpsN * 16;
#pragma unroll
  for (int k = 0; k < G::kK; k += 16) {
    uint32_t x[G::kWarpsN][4];
#pragma unroll
    for (int i = 0; i < G::kWarpsN; ++i) load_a(x[i], stage, G::kPitch, band + 16 * i, k);
#pragma unroll
    for (int n = 0; n < G::kColumns / 8; n += 2) {
      uint32_t w[4];
      load_b<G::kFlipped>(w, stage + G::kW, G::kWPitch, warp % G::kWarpsN * G::kColumns + 8 * n, k);
#pragma unroll
      for (int i = 0; i < G::kWarpsN; ++i) {
        mma_m16n8k16<T>(sums.y[i][n], x[i], w[0], w[1]);
        mma_m16n8k16<T>(sums.y[i][n + 1], x[i], w[2], w[3]);
      }
    }
    uint32_t own[4];
    load_a(own, stage, G::kPitch, 16 * warp, k);
    if (drop_x) {
      const uint32_t kept = mask.kept_16x16(16 * warp, k0 + k);
#pragma unroll
      for (int i = 0; i < 4; ++i) own[i] &= kept_pair(kept >> 2 * i);
    }
#pragma unroll
    for (int r = 0; r < G::kRank; r += 16) {
      if (r > 0 && r >= rank) break;
      uint32_t a[4];
      load_b<false>(a, stage + G::kA, G::kPitch, r, k);
      mma_m16n8k16<T>(sums.p[r / 8], own, a[0], a[1]);
      mma_m16n8k16<T>(sums.p[r / 8 + 1], own, a[2], a[3]);
    }
  }
}

/// P, rounded to T, to shared memory.
template <class G>
__device__ inline void put_p(typename G::T* to, const GemmSums<G>& sums, float factor, int rank) {
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < G::kRank / 8; ++i) {
    const int r = 8 * i + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // An infinity of x has made the columns beyond the rank NaN.
      const float low = r < rank ? factor * sums.p[i][2 * half] : 0.0f;
      const float high = r + 1 < rank ? factor * sums.p[i][2 * half + 1] : 0.0f;
      store_shared(reinterpret_cast<uint32_t*>(to + (row + 8 * half) * G::kPPitch + r),
                   pack<typename G::T>(low, high));
    }
  }
}

/// y = sum + b + s P B^T, rounded to T, to shared memory.
template <class G>
__device__ inline void put_y(typename G::T* memory, const GemmSums<G>& sums, const LoraGemm& g, const Mask& mask,
                             int n0) {
  using T = typename G::T;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, band = warp / G::kWarpsN * G::kWarpsN * 16;
  const auto* bias = reinterpret_cast<const float*>(memory + G::kBias);
  const float factor = g.scaling * (g.drop_term ? g.dropout.inverse_keep : 1.0f);
#pragma unroll
  for (int i = 0; i < G::kWarpsN; ++i) {
    uint32_t p[G::kRank / 16][4];
#pragma unroll
    for (int step = 0; step < G::kRank / 16; ++step) load_a(p[step], memory, G::kPPitch, band + 16 * i, 16 * step);
    uint32_t kept = 0xFFFFFFFF;
    if (g.drop_term) {
      kept = 0;
      // Drawn before and not among the products, which are unrolled.
#pragma unroll 1
      for (int n = 0; n < G::kColumns; n += 16) {
        kept |= mask.kept_16x16(band + 16 * i, n0 + warp % G::kWarpsN * G::kColumns + n) << n / 2;
      }
    }
#pragma unroll
    for (int n = 0; n < G::kColumns / 8; n += 2) {
      const int column = warp % G::kWarpsN * G::kColumns + 8 * n;
      float term[2][4] = {};
#pragma unroll
      for (int step = 0; step < G::kRank / 16; ++step) {
        if (step > 0 && 16 * step >= g.rank) break;
        mma_step<T, 2, false>(term, p[step], memory + G::kB, G::kPPitch, column, 16 * step);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = band + 16 * i + lane / 4 + j % 2 * 8, c = column + j / 2 * 8 + lane % 4 * 2;
        float numbers[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = j % 2 * 2 + e;
          const float low_rank = kept >> (4 * n + 2 * j + e) & 1 ? factor * term[j / 2][at] : 0.0f;
          numbers[e] = sums.y[i][n + j / 2][at] + load_shared(bias + c + e) + low_rank;
        }
        store_shared(reinterpret_cast<uint32_t*>(memory + G::kY + row * G::kYPitch + c),
                     pack<T>(numbers[0], numbers[1]));
      }
    }
  }
}

template <class G>
__global__ void __launch_bounds__(G::kThreads, G::kBlocks) lora_gemm_kernel(const __grid_constant__ LoraGemm g) {
  using T = typename G::T;
  T* memory = reinterpret_cast<T*>(shared_memory());
  // Blocks that run together share tiles of x and W in L2: eight tiles of rows at a time, column by column.
  constexpr int kGroup = 8;
  const int first_m = blockIdx.x / (kGroup * g.tiles_n) * kGroup, in_group = blockIdx.x % (kGroup * g.tiles_n);
  const int group = min(kGroup, g.tiles_m - first_m);
  const int tile_m = first_m + in_group % group, n0 = in_group / group * G::kN;
  const int64_t first = static_cast<int64_t>(tile_m % g.tiles_l) * G::kM;
  const Tile tile{tile_m / g.tiles_l, first, static_cast<int>(min(static_cast<int64_t>(G::kM), g.length - first))};
  const uint64_t seed = g.dropout.seed == nullptr ? 0 : static_cast<uint64_t>(load_global(g.dropout.seed));
  const Mask mask{seed, g.dropout.threshold, tile.batch * g.length + first};
  const bool drop_x = g.dropout.seed != nullptr && !g.drop_term;

  const Tile columns{0, n0, min(G::kN, g.n - n0)};
  load_tile<T, G::kN, G::kRank, G::kThreads>(memory + G::kB, G::kPPitch, g.b, columns, 0, g.rank);
  for (int i = threadIdx.x; i < G::kN; i += G::kThreads) {
    const bool exists = g.bias.data != nullptr && n0 + i < g.n;
    store_shared(reinterpret_cast<float*>(memory + G::kBias) + i, exists ? load_vector(g.bias, n0 + i) : 0.0f);
  }
  GemmSums<G> sums = {};
  Operands<G> operands(g, tile, n0);
  using AChunk = Chunk<T, G::kRank, G::kK>;
  constexpr int kChunks = (AChunk::kCount + G::kThreads - 1) / G::kThreads;
  AChunk a[kChunks];
  const Tile a_rows{0, 0, g.rank};
  const int steps = (g.k + G::kK - 1) / G::kK;
  for (int step = 1 - G::kStages; step < steps; ++step) {
    const int ahead = step + G::kStages - 1;
    T* free = memory + ahead % G::kStages * G::kStage;
    if (step >= 0) {
      cp_async_wait<G::kStages - 2>();
      __syncthreads();
    }
    if (ahead < steps) {
      operands.fetch(free);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) a[i].load(threadIdx.x + i * G::kThreads, g.a, a_rows, ahead * G::kK, g.k);
    }
    cp_async_commit();
    if (step >= 0) multiply<G>(sums, memory + step % G::kStages * G::kStage, mask, drop_x, step * G::kK, g.rank);
    if (ahead >= steps) continue;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (threadIdx.x + i * G::kThreads < AChunk::kCount) a[i].store(free + G::kA, G::kPitch);
    }
  }
  __syncthreads();
  put_p<G>(memory, sums, g.p_scaling * (drop_x ? g.dropout.inverse_keep : 1.0f), g.rank);
  __syncthreads();
  if (n0 == 0 && g.p.data != nullptr) {
    store_tile<T, G::kM, G::kRank, G::kThreads>(g.p, memory, G::kPPitch, tile, 0, g.rank);
  }
  if (g.y.data == nullptr) return;
  put_y<G>(memory, sums, g, mask, n0);
  __syncthreads();
  store_tile<T, G::kM, G::kN, G::kThreads>(g.y, memory + G::kY, G::kYPitch, tile, n0, g.n);
}

/// A block's sum is (kC, kRank), over tiles of kM rows.
template <class T_, int kRank_>
struct SumTile {
  using T = T_;
  static constexpr int kC = 128, kM = 32, kStages = 4, kRank = kRank_;
  static constexpr int kThreads = kC, kBlocks = kRank == 16 ? 4 : 3;
  static constexpr int kPitch = tile_pitch(kC), kPPitch = tile_pitch(kRank);
  static constexpr int kP = kM * kPitch, kStage = kP + kM * kPPitch;
  static constexpr int kSharedBytes = 2 * kStages * kStage;
};

/// Drops numbers of a tile of t that lies in shared memory.
template <class S>
__device__ inline void drop_tile(typename S::T* tile, const Mask& mask, int c0) {
  for (int i = threadIdx.x; i < S::kM * S::kC / 4; i += S::kThreads) {
    const int row = i / (S::kC / 4), column = i % (S::kC / 4) * 4;
    const uint32_t kept = mask.kept((c0 + column) / 4, row);
    auto* at = reinterpret_cast<uint2*>(tile + row * S::kPitch + column);
    uint2 words = load_shared(at);
    words.x &= kept_pair(kept);
    words.y &= kept_pair(kept >> 2);
    store_shared(at, words);
  }
}

/// One part of a sum: blockIdx.x counts tiles of channels and splits, blockIdx.y the sums.
template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) lora_sums_kernel(const __grid_constant__ LoraSums p) {
  using T = typename S::T;
  const LoraSum& g = p.sums[blockIdx.y];
  if (static_cast<int>(blockIdx.x) >= g.tiles_c * g.splits) return;
  T* memory = reinterpret_cast<T*>(shared_memory());
  const int c0 = blockIdx.x % g.tiles_c * S::kC, split = blockIdx.x / g.tiles_c;
  const int64_t first = static_cast<int64_t>(split) * g.steps;
  const int steps = static_cast<int>(min(static_cast<int64_t>(g.steps), p.batch * p.tiles_l - first));
  const uint64_t seed = g.dropout.seed == nullptr ? 0 : static_cast<uint64_t>(load_global(g.dropout.seed));
  const auto tile_of_step = [&](int step) {
    const int64_t index = first + step, l = index % p.tiles_l * S::kM;
    return Tile{index / p.tiles_l, l, static_cast<int>(min(static_cast<int64_t>(S::kM), p.length - l))};
  };
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float sum[2][S::kRank / 8][4] = {};
  for (int step = 1 - S::kStages; step < steps; ++step) {
    const int ahead = step + S::kStages - 1;
    if (step >= 0) {
      cp_async_wait<S::kStages - 2>();
      __syncthreads();
    }
    if (ahead < steps) {
      T* free = memory + ahead % S::kStages * S::kStage;
      const Tile tile = tile_of_step(ahead);
      load_tile<T, S::kM, S::kC, S::kThreads>(free, S::kPitch, g.t, tile, c0, g.channels);
      load_tile<T, S::kM, S::kRank, S::kThreads>(free + S::kP, S::kPPitch, g.p, tile, 0, p.rank);
    }
    cp_async_commit();
    if (step < 0) continue;
    T* stage = memory + step % S::kStages * S::kStage;
    if (g.dropout.seed != nullptr) {
      const Tile tile = tile_of_step(step);
      drop_tile<S>(stage, {seed, g.dropout.threshold, tile.batch * p.length + tile.first}, c0);
      __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < S::kM; k += 16) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t t[4];
        load_a_trans(t, stage, S::kPitch, warp * 32 + 16 * i, k);
        mma_step<T, S::kRank / 8, true>(sum[i], t, stage + S::kP, S::kPPitch, 0, k);
      }
    }
  }
  float* parts = g.parts + (static_cast<int64_t>(split) * g.tiles_c * S::kC + c0) * S::kRank;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < S::kRank / 8; ++j) {
      float* to = parts + (warp * 32 + 16 * i + lane / 4) * S::kRank + 8 * j + lane % 4 * 2;
      store_global(reinterpret_cast<float2*>(to), float2{sum[i][j][0], sum[i][j][1]});
      store_global(reinterpret_cast<float2*>(to + 8 * S::kRank), float2{sum[i][j][2], sum[i][j][3]});
    }
  }
}

constexpr int kGradientThreads = 128;

/// gradient = factor times the sum of its parts, always in the same order.
template <int kPartChannels>
__global__ void __launch_bounds__(kGradientThreads) lora_gradients_kernel(const __grid_constant__ LoraSums p) {
  const LoraSum& g = p.sums[blockIdx.y];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kGradientThreads + threadIdx.x;
  const int64_t c = i / p.pitch, part = static_cast<int64_t>(g.tiles_c) * kPartChannels * p.pitch;
  const int r = static_cast<int>(i % p.pitch);
  if (c >= g.channels || r >= p.rank) return;
  float total = 0.0f;
#pragma unroll 8
  for (int split = 0; split < g.splits; ++split) total += load_global(g.parts + split * part + i);
  store_number(g.gradient.data, g.gradient.number, c * g.gradient.stride_l + r * g.gradient.stride_c,
               g.factor * total);
}

}  // namespace pyfused
