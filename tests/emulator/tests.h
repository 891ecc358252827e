// The kernels that the emulator is tested with, as their Python module calls them.
#pragma once

#include <cstdint>
#include <string>

#include "emulator.h"

namespace pyfused {

/// Contiguous rows that are `pitch` numbers apart.
struct Matrix {
  void* data;
  int rows, columns, pitch;
};

/// c = a b in float32, for 16-bit a and b, with one of gemm.cu's mistakes.
void gemm(bool bf16, const Matrix& a, const Matrix& b, const Matrix& c, int mistake);

/// The kernel `name` of probes.cu.
void probe(const std::string& name, const uint32_t* in, uint32_t* out, dim3 grid, int threads, int shared_bytes);

/// y = z + (z D^T) U^T, and z D^T, in bfloat16.
void adapter_forward(const Matrix& z, const Matrix& down, const Matrix& up, const Matrix& y, const Matrix& hidden,
                     int stages);

/// The dropout mask's words, (4 rows, 8 quads of 4).
void philox_words(int64_t seed, int64_t first_row, uint32_t first_quad, uint32_t* words);

}  // namespace pyfused
