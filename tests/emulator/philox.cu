// The dropout mask's words at rows and columns that no test could reach through an operator.
#include "philox.cuh"

#include "launch.h"
#include "tests.h"

namespace pyfused {

struct Words {
  uint64_t seed;
  int64_t first_row;
  uint32_t first_quad;
  uint4* words;
};

/// (4 rows, 8 quads).
__global__ void philox_kernel(const Words p) {
  store_global(p.words + threadIdx.x, philox(p.seed, p.first_quad + threadIdx.x % 8, p.first_row + threadIdx.x / 8));
}

void philox_words(int64_t seed, int64_t first_row, uint32_t first_quad, uint32_t* words) {
  const Words p = {static_cast<uint64_t>(seed), first_row, first_quad, reinterpret_cast<uint4*>(words)};
  launch<philox_kernel>(dim3(1), 32, 0, nullptr, p);
}

}  // namespace pyfused
