// Launchers of adapter_residual: parameters of its kernels, and what starts them.
#pragma once

#include "activation.h"
#include "row_sums.h"
#include "types.h"

namespace pyfused {

/// What forward and backward read. z, down (h, C) and up (C, h) have one 16-bit type or are float32; h is `width`.
struct Adapter {
  Rows z, down, up;
  Vector down_bias, up_bias, gamma, sample_scale;
  int64_t batch, length, per_sample;
  int channels, width;
  float skip;
  Activation activation;
  Dropout dropout;
  Number number;  // of the products
  // What a launcher sets: tiles of rows in an image, slots of the pipeline.
  int tiles_l, stages;
};

struct AdapterForward : Adapter {
  Rows residual, y;
  Rows hidden;  // (M, h)
  bool z_is_residual;
};

/// Without hidden (M, h) it is computed from z again. dz, dh and activated, k a, are made where they have data; dh and
/// activated are (M, pitch) with zeros beyond h, dh divided by the root of the largest |gamma|.
struct AdapterBackwardRows : Adapter {
  Rows dy, hidden, dz, dh, activated;
  int pitch;
  bool z_is_residual;
};

/// Contiguous gradients out of the sums; data null: not wanted.
struct AdapterGradients : Adapter {
  RowSums sums;
  Vector d_down, d_down_bias, d_up, d_up_bias;
  float* d_gamma;
};

void adapter_forward(const AdapterForward& parameters, void* stream);
void adapter_backward_rows(const AdapterBackwardRows& parameters, void* stream);
void adapter_gradients(const AdapterGradients& parameters, void* stream);

}  // namespace pyfused
