// Launchers of lora_linear: parameters of its kernels, and what starts them.
#pragma once

#include "types.h"

namespace pyfused {

/// y (B, L, N) = x W^T + b + s P B^T with P = t drop(x) A^T; with `drop_term` dropout masks P B^T instead of x, and with
/// x = dy, W^T, B^T and A^T for W, A and B, s = 1 and t the scaling that is dx. x, W, P and y have one 16-bit type, to
/// which P is rounded once.
struct LoraGemm {
  Rows x, weight, a, b;  // (B, L, K), (N, K), (R, K), (N, R)
  Vector bias;
  Rows p, y;  // (B, L, R), (B, L, N); data null: not wanted
  int64_t batch, length;
  int k, n, rank;  // n 0: P alone
  float scaling, p_scaling;  // s, t
  Dropout dropout;
  bool drop_term;
  // What the launcher sets: tiles of rows in an image and in all, tiles of columns.
  int tiles_l, tiles_m, tiles_n;
};

/// gradient (C, R) = factor drop(t)^T p, a sum over rows in `splits` parts of `steps` tiles of rows.
struct LoraSum {
  Rows t, p;  // (B, L, C), (B, L, R), of one 16-bit type
  Rows gradient;
  int channels;
  float factor;
  Dropout dropout;
  float* parts;
  int tiles_c, splits, steps;
};

/// The gradients of one backward pass: dA, dB or both.
struct LoraSums {
  LoraSum sums[2];
  int count;
  int64_t batch, length;
  int rank;
  int tiles_l, pitch;  // pitch: numbers of a part for one channel
};

/// The transpose of a matrix.
inline Rows transposed(Rows matrix) {
  const int64_t stride = matrix.stride_l;
  matrix.stride_l = matrix.stride_c;
  matrix.stride_c = stride;
  return with_access(matrix);
}

/// Sets all but the tensors and `parts`; returns how many floats the parts of sum `i` need.
void lay_out_parts(LoraSums& sums);
int64_t floats_of_parts(const LoraSums& sums, int i);

void lora_gemm(const LoraGemm& parameters, void* stream);
void lora_sums(const LoraSums& parameters, void* stream);

}  // namespace pyfused
