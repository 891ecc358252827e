// Dropout's mask: the same bits on every backend.
#pragma once

#include "device.cuh"

namespace pyfused {

/// Philox-4x32-10 with key `seed` and counter (quad, row low, row high, 0): the words of columns 4 quad to 4 quad + 3.
__device__ inline uint4 philox(uint64_t seed, uint32_t quad, int64_t row) {
  uint32_t c0 = quad, c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(row >> 32), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

}  // namespace pyfused
