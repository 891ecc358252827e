// Products of a warp: fragments from shared memory, fragments from sums, steps along K.
#pragma once

#include "device.cuh"

namespace pyfused {

/// Elements from one row of a 16-bit tile in shared memory to the next, for rows of `columns`: an odd multiple of 16
/// bytes, so that eight rows of a matrix lie in different banks.
__host__ __device__ constexpr int tile_pitch(int columns) { return ((columns + 7) / 8 | 1) * 8; }

/// A (16, 16) from a tile whose rows are A's rows and whose columns are K.
template <class T>
__device__ inline void load_a(uint32_t (&a)[4], const T* tile, int pitch, int row, int k) {
  const int lane = threadIdx.x % 32;
  ldmatrix_x4(a, tile + (row + lane % 16) * pitch + k + lane / 16 * 8);
}

/// The same from a tile whose rows are K and whose columns are A's rows.
template <class T>
__device__ inline void load_a_trans(uint32_t (&a)[4], const T* tile, int pitch, int row, int k) {
  const int lane = threadIdx.x % 32;
  ldmatrix_x4_trans(a, tile + (k + lane % 8 + lane / 16 * 8) * pitch + row + lane / 8 % 2 * 8);
}

/// A (16, 16) out of columns 16 step to 16 step + 15 of a sum, rounded to T.
template <class T, int kTiles>
__device__ inline void pack_a(uint32_t (&a)[4], const float (&sum)[kTiles][4], int step) {
  a[0] = pack<T>(sum[2 * step][0], sum[2 * step][1]);
  a[1] = pack<T>(sum[2 * step][2], sum[2 * step][3]);
  a[2] = pack<T>(sum[2 * step + 1][0], sum[2 * step + 1][1]);
  a[3] = pack<T>(sum[2 * step + 1][2], sum[2 * step + 1][3]);
}

/// B (16, 16) at K = k and columns n. The tile has K along its rows, one row for each column of B, or with kTrans K
/// down its rows; b[0] and b[1] are of the first eight columns.
template <bool kTrans, class T>
__device__ inline void load_b(uint32_t (&b)[4], const T* tile, int pitch, int n, int k) {
  const int lane = threadIdx.x % 32;
  if constexpr (kTrans) {
    ldmatrix_x4_trans(b, tile + (k + lane % 16) * pitch + n + lane / 16 * 8);
  } else {
    ldmatrix_x4(b, tile + (n + lane % 8 + lane / 16 * 8) * pitch + k + lane / 8 % 2 * 8);
  }
}

/// sum (16, 8 kTiles) += A (16, 16) times columns n to n + 8 kTiles of B, at K = k to k + 15, from a tile as load_b's.
template <class T, int kTiles, bool kTrans>
__device__ inline void mma_step(float (&sum)[kTiles][4], const uint32_t (&a)[4], const T* tile, int pitch, int n,
                                int k) {
  static_assert(kTiles % 2 == 0);
#pragma unroll
  for (int i = 0; i < kTiles; i += 2) {
    uint32_t b[4];
    load_b<kTrans>(b, tile, pitch, n + 8 * i, k);
    mma_m16n8k16<T>(sum[i], a, b[0], b[1]);
    mma_m16n8k16<T>(sum[i + 1], a, b[2], b[3]);
  }
}

}  // namespace pyfused
