// What a kernel may ask of the machine: CUDA under nvcc, the emulator of tests/emulator under a host compiler.
//
// Kernels touch memory through these functions alone, which is how the emulator sees every access: global memory by
// load_global and store_global, shared memory by load_shared and store_shared, ldmatrix and cp_async.
#pragma once

#include <cstdint>

#ifndef __CUDACC__

#include "emulator.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace pyfused {

/// The block's dynamic shared memory, aligned to 128 bytes.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

/// V has 1, 2, 4, 8 or 16 bytes, and the address is a multiple of that.
template <class V>
__device__ inline V load_global(const V* at) {
  return *at;
}
template <class V>
__device__ inline void store_global(V* at, V value) {
  *at = value;
}
template <class V>
__device__ inline V load_shared(const V* at) {
  return *at;
}
template <class V>
__device__ inline void store_shared(V* at, V value) {
  *at = value;
}

/// Copies `bytes` (0 to 16) of global memory to 16 bytes of shared memory and fills up with zeros; both addresses are
/// multiples of 16. Nothing is there before the cp_async_wait that covers it.
__device__ inline void cp_async_16(void* shared, const void* global, int bytes) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
/// Closes this thread's group of copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most kPending of this thread's newest groups are under way.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Four 8x8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8, a multiple of 16.
__device__ inline void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}
/// The same, each matrix transposed.
__device__ inline void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float to_float(float16 x) { return __half2float(__ushort_as_half(x.bits)); }

/// Rounds to nearest even.
template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline bfloat16 from_float<bfloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ inline float16 from_float<float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

/// Two 16-bit numbers in one register, `low` in its low half.
template <class T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return static_cast<uint32_t>(__bfloat16_as_ushort(both.y)) << 16 | __bfloat16_as_ushort(both.x);
}
template <>
__device__ inline uint32_t pack<float16>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return static_cast<uint32_t>(__half_as_ushort(__high2half(both))) << 16 | __half_as_ushort(__low2half(both));
}

/// sum += a b for a (16, 16), b (16, 8), sum (16, 8), in the fragments of PTX's mma.m16n8k16: lane i holds of the sum
/// columns 2 (i % 4) and the next in rows i / 4 and i / 4 + 8.
template <class T>
__device__ inline void mma_m16n8k16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma_m16n8k16<bfloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma_m16n8k16<float16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace pyfused

#endif
