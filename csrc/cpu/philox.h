// Dropout's mask: the same bits on every backend.
#pragma once

#include "simd.h"

namespace pyfused {
namespace {

/// 1 / (1 - p) or 0 for each column of a row; room for whole quads of columns.
///
/// Philox-4x32-10 with key `seed` and counter (column / 4, row low, row high, 0), whose four words are of four columns.
void dropout_factors(const Dropout& dropout, int64_t row, int64_t columns, float* out) {
  for (int64_t c = 0; c < columns; c += 4) {
    uint32_t x[4] = {static_cast<uint32_t>(c / 4), static_cast<uint32_t>(row),
                     static_cast<uint32_t>(row >> 32), 0};
    uint32_t low_key = static_cast<uint32_t>(*dropout.seed), high_key = static_cast<uint32_t>(*dropout.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t first = uint64_t{0xD2511F53u} * x[0], second = uint64_t{0xCD9E8D57u} * x[2];
      x[0] = static_cast<uint32_t>(second >> 32) ^ x[1] ^ low_key;
      x[1] = static_cast<uint32_t>(second);
      x[2] = static_cast<uint32_t>(first >> 32) ^ x[3] ^ high_key;
      x[3] = static_cast<uint32_t>(first);
      low_key += 0x9E3779B9u;
      high_key += 0xBB67AE85u;
    }
    for (int i = 0; i < 4; ++i) out[c + i] = x[i] >= dropout.threshold ? dropout.inverse_keep : 0.0f;
  }
}

}  // namespace
}  // namespace pyfused
