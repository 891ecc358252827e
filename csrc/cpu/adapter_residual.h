// adapter_residual on a CPU: what its kernels are told; no torch header.
//
//     y = residual + k (gamma (skip z + u) + a (gamma U)^T)     a = drop(phi(h)),  h = z D^T + d      (M, width)
//
// Forward takes a block of rows from z to y. Backward takes blocks of rows to dz, dh and k a, and then panels of channels
// through all rows: every sum has its terms in an order of its own, on however many threads.
#pragma once

#include "../activation.h"
#include "rows.h"

namespace pyfused {

/// What both directions read. Weights have no batch; `number` is what parameters are rounded to.
struct Adapter {
  Rows z, down, up;
  Vector down_bias, up_bias, gamma;
  const float* sample_scale;  // of every per_sample rows; null: 1
  int64_t per_sample, channels, width;
  Live live;
  float skip;
  Activation activation;
  Dropout dropout;
  Number number;
  bool turned;  // tiles of z, y and their gradients are: positions lie together in all of them
  // What `prepare` makes of the vectors, of `padded` sizes: d, then gamma u, skip gamma, gamma and u.
  float* vectors;
  // What `pack` makes of the weights: D^T (C, width) and (gamma U)^T (width, C) for products of z, gamma U (C, width) and
  // D (width, C) for products of dy.
  float *down_t, *up_t, *gated_up, *plain_down;
};

struct AdapterForward : Adapter {
  Rows residual, y, hidden;  // hidden: (M, width); data null: not kept
};

/// Without hidden it is computed from z again. What has no data is not made.
struct AdapterBackwardRows : Adapter {
  Rows dy, hidden, dz;
  float *dh, *activated;  // (live rows, pitch): dh, and k a where it is not made again from hidden
  int64_t pitch;
  bool z_is_residual;
};

/// Sums over rows. They are made in `parts` of the rows, each of which has `sums`: for every panel of channels dh^T z,
/// then (k a)^T dy, of turned tiles their transposes, then sum k dy and sum k dy z; and behind the last part sum dh for
/// each part.
struct AdapterSums : Adapter {
  Rows dy, hidden;
  float *dh, *activated;  // read alone; without activated k a is made from hidden
  int64_t pitch, rows, parts;
  float* sums;
  Rows d_down, d_up;  // (width, C) and (C, width); data null: not wanted
  Vector d_down_bias, d_up_bias;
  float* d_gamma;
};

/// Functions of one instruction set.
struct AdapterKernels {
  int64_t panel;  // channels of a panel
  void (*prepare)(const Adapter&);
  void (*pack_forward)(const Adapter&, int64_t panel);
  void (*pack_backward)(const Adapter&, int64_t panel);
  void (*copy)(const Rows& from, const Rows& to, const Live&, int64_t first, int64_t count, int64_t columns,
               float* scratch);
  void (*forward)(const AdapterForward&, int64_t first, int64_t count, float* scratch);
  void (*backward_rows)(const AdapterBackwardRows&, int64_t first, int64_t count, float* scratch);
  void (*add_panels)(const AdapterSums&, int64_t part, int64_t begin, int64_t end, float* scratch);
  void (*add_down_bias)(const AdapterSums&, int64_t part);
  void (*finish)(const AdapterSums&, int64_t panel, float* scratch);
  void (*finish_down_bias)(const AdapterSums&);
};

}  // namespace pyfused
