// Sums over rows of the bottleneck family, cut into parts.
#pragma once

#include "types.h"

namespace pyfused {

/// Sums over rows in `splits` parts, each of part_size floats: z^T dh and k dy^T activated (C, pitch each), then the sums
/// of dh (pitch), k dy and k dy z (C each); of what is not needed a part holds nothing. k is one number for `per_sample`
/// rows: rows with k = 0 are not read, and `activated` has the factor already. A float32 dy is multiplied by the root of
/// the largest |gamma| for its product.
struct RowSums {
  Rows z, dy;          // (B, L, C); without z there is no z^T dh and no k dy z
  Rows dh, activated;  // (B, L, pitch)
  Vector gamma, sample_scale;
  int64_t batch, length, per_sample;
  int channels, width;
  Number number;  // of the products
  bool need_down, need_up;
  // Set by lay_out_parts, but `parts`.
  float* parts;
  int splits, pitch;
  int64_t part_size;
  // Set by the launcher.
  int tiles_l, stages;
};

void lay_out_parts(RowSums& sums);
void sum_over_rows(const RowSums& sums, void* stream);

}  // namespace pyfused
