// What a tile of a GEMM costs, by which launchers choose one. None has been timed on a GPU yet.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pyfused {

/// Multiply-adds of a multiprocessor in a cycle with mma.sync in 16 bits: data sheets, and on Hopper and Blackwell's data
/// centre GPUs 0.62 of wgmma's 2048 (Luo et al., 2024).
inline int products_of_mma_sync(int capability) {
  switch (capability / 10) {
    case 9:
    case 10:
      return 1270;
    default:
      return capability == 80 ? 1024 : 512;
  }
}

/// What the busiest multiprocessor does, in multiply-adds; `tile_cost` of kernels/lora_linear_config.py is the same, and
/// says what its numbers are.
inline double gemm_cost(int64_t tiles, int multiprocessors, int k, int block_m, int block_n, int narrow,
                        int operand_bytes, int products) {
  constexpr double kCacheBytes = 44, kBesideLoop = 4000;
  const double step = std::max<double>(block_m * (block_n + narrow), products * operand_bytes / kCacheBytes);
  return static_cast<double>((tiles + multiprocessors - 1) / multiprocessors) * (k * step + products * kBesideLoop);
}

}  // namespace pyfused
