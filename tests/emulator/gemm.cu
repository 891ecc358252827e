// c = a b in float32, for 16-bit a (rows, inner) and b (inner, columns) whose rows start at multiples of 16 bytes:
// tiles of 64x64, four warps, three stages of copies. It can be told to make one of the mistakes that the emulator is
// for.
#include "device.cuh"
#include "launch.h"
#include "tests.h"

namespace pyfused {

constexpr int kTile = 64;
constexpr int kDepth = 32;
constexpr int kStages = 3;
constexpr int kThreads = 128;
// Rows of the tiles, so padded that eight in a column lie in different banks.
constexpr int kPitchA = kDepth + 8;
constexpr int kPitchB = kTile + 8;
constexpr int kStageElements = kTile * kPitchA + kDepth * kPitchB;

enum Mistake { kNone, kNoBarrier, kNoWait, kTailRead, kFragmentIndex };

struct Gemm {
  const void* a;
  const void* b;
  float* c;
  int rows, columns, inner;
  int pitch_a, pitch_b;
  int mistake;
};

/// Starts the copies of a (height, width) tile at (row, column) of a (rows, columns) matrix; zeros beyond it.
template <class T>
__device__ void copy_tile(T* tile, int tile_pitch, int height, int width, const T* matrix, int pitch, int row,
                          int column, int rows, int columns) {
  const int per_row = width / 8;
  for (int i = threadIdx.x; i < height * per_row; i += kThreads) {
    const int r = i / per_row;
    const int c = i % per_row * 8;
    const int count = row + r < rows ? min(max(columns - column - c, 0), 8) : 0;
    const T* from = matrix + (count > 0 ? int64_t{row + r} * pitch + column + c : 0);
    cp_async_16(tile + r * tile_pitch + c, from, count * 2);
  }
}

template <class T>
__device__ void copy_stage(const Gemm& p, T* tiles, int step) {
  const int rows = p.mistake == kTailRead ? p.rows + 1 : p.rows;
  T* stage = tiles + step % kStages * kStageElements;
  if (step * kDepth < p.inner) {
    copy_tile(stage, kPitchA, kTile, kDepth, static_cast<const T*>(p.a), p.pitch_a, blockIdx.y * kTile, step * kDepth,
              rows, p.inner);
    copy_tile(stage + kTile * kPitchA, kPitchB, kDepth, kTile, static_cast<const T*>(p.b), p.pitch_b, step * kDepth,
              blockIdx.x * kTile, p.inner, p.columns);
  }
  cp_async_commit();
}

/// A warp's share of a stage: 16 rows of the tile.
template <class T>
__device__ void multiply_stage(const Gemm& p, const T* stage, float (&sum)[8][4]) {
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x / 32 * 16;
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[4];
    ldmatrix_x4(a, stage + (row + lane % 16) * kPitchA + k + lane / 16 * 8);
    for (int n = 0; n < 8; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, stage + kTile * kPitchA + (k + lane % 16) * kPitchB + (n + lane / 16) * 8);
      const int first = p.mistake == kFragmentIndex ? 1 : 0;
      mma_m16n8k16<T>(sum[n], a, b[first], b[1 - first]);
      mma_m16n8k16<T>(sum[n + 1], a, b[2], b[3]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) gemm_kernel(const Gemm p) {
  T* tiles = reinterpret_cast<T*>(shared_memory());
  const int steps = (p.inner + kDepth - 1) / kDepth;
  float sum[8][4] = {};
  for (int step = 0; step < kStages - 1; ++step) copy_stage(p, tiles, step);
  for (int step = 0; step < steps; ++step) {
    if (p.mistake != kNoWait) cp_async_wait<kStages - 2>();
    if (p.mistake != kNoBarrier) __syncthreads();
    copy_stage(p, tiles, step + kStages - 1);
    multiply_stage(p, tiles + step % kStages * kStageElements, sum);
  }
  const int lane = threadIdx.x % 32;
  for (int n = 0; n < 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int row = blockIdx.y * kTile + threadIdx.x / 32 * 16 + lane / 4 + i / 2 * 8;
      const int column = blockIdx.x * kTile + n * 8 + lane % 4 * 2 + i % 2;
      if (row < p.rows && column < p.columns) store_global(p.c + int64_t{row} * p.columns + column, sum[n][i]);
    }
  }
}

template <class T>
void launch_gemm(const Gemm& p) {
  const dim3 grid((p.columns + kTile - 1) / kTile, (p.rows + kTile - 1) / kTile);
  launch<gemm_kernel<T>>(grid, kThreads, kStages * kStageElements * sizeof(T), nullptr, p);
}

void gemm(bool bf16, const Matrix& a, const Matrix& b, const Matrix& c, int mistake) {
  const Gemm p = {a.data, b.data, static_cast<float*>(c.data), c.rows, c.columns, b.rows, a.pitch, b.pitch, mistake};
  bf16 ? launch_gemm<bfloat16>(p) : launch_gemm<float16>(p);
}

}  // namespace pyfused
