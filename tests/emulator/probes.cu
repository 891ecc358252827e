// Small kernels that each do one thing, right or wrong. The line where a wrong one is caught says `here`, that of the
// other operation that it may be caught in or that the message also names `there`.
#include <cstdint>
#include <map>
#include <string>

#include "device.cuh"
#include "launch.h"
#include "tests.h"

namespace pyfused {

struct Probe {
  void (*body)(const Probe&);
  const uint32_t* in;
  uint32_t* out;
  int shared_bytes;
};

__global__ void probe_kernel(const Probe p) { p.body(p); }

namespace {

uint32_t* words() { return reinterpret_cast<uint32_t*>(shared_memory()); }

template <class T>
void multiply(const Probe& p) {
  // Of each lane: four words of a, two of b, four of the sum.
  const uint32_t* in = p.in + threadIdx.x * 10;
  uint32_t a[4], b[2];
  float sum[4];
  for (int i = 0; i < 4; ++i) a[i] = load_global(in + i);
  for (int i = 0; i < 2; ++i) b[i] = load_global(in + 4 + i);
  for (int i = 0; i < 4; ++i) sum[i] = __uint_as_float(load_global(in + 6 + i));
  mma_m16n8k16<T>(sum, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) store_global(p.out + threadIdx.x * 4 + i, __float_as_uint(sum[i]));
}

template <bool kTransposed>
void load_matrices(const Probe& p) {
  // Row i lies at 16 bytes times (5 i) % 32.
  char* row = shared_memory() + threadIdx.x * 5 % 32 * 16;
  store_shared(reinterpret_cast<uint4*>(row), load_global(reinterpret_cast<const uint4*>(p.in) + threadIdx.x));
  __syncwarp();
  uint32_t words[4];
  kTransposed ? ldmatrix_x4_trans(words, row) : ldmatrix_x4(words, row);
  for (int i = 0; i < 4; ++i) store_global(p.out + threadIdx.x * 4 + i, words[i]);
}

/// Two warps; the second reads what the first has written before the barrier.
void read_after_write(bool by_barrier) {
  if (threadIdx.x < 32) store_shared(words() + threadIdx.x, 1u);  // there: read after write
  by_barrier ? __syncthreads() : __syncwarp();
  if (threadIdx.x >= 32) load_shared(words() + threadIdx.x - 32);  // here: read after write
}

const std::map<std::string, void (*)(const Probe&)> kProbes = {
    {"mma bfloat16", multiply<bfloat16>},
    {"mma float16", multiply<float16>},
    {"ldmatrix", load_matrices<false>},
    {"ldmatrix transposed", load_matrices<true>},
    {"shuffles",
     [](const Probe& p) {
       const uint32_t word = load_global(p.in + threadIdx.x);
       store_global(p.out + threadIdx.x, __shfl_xor_sync(~0u, word, 5));
       const float number = __shfl_sync(~0u, __uint_as_float(word), 7);
       store_global(p.out + blockDim.x + threadIdx.x, __float_as_uint(number));
     }},
    {"every place",
     [](const Probe& p) {
       const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
       const unsigned i = block * blockDim.x + threadIdx.x;
       store_global(p.out + i, i);
     }},
    {"order of threads",
     [](const Probe& p) {
       // The atomic that CUDA has not: the emulator runs one thread at a time.
       const uint32_t turn = load_global(p.out);
       store_global(p.out, turn + 1);
       store_global(p.out + 1 + turn, blockIdx.x * blockDim.x + threadIdx.x);
     }},
    {"barrier", [](const Probe&) { read_after_write(true); }},
    {"exchange in a warp",
     [](const Probe& p) {
       store_shared(words() + threadIdx.x, threadIdx.x);
       __syncwarp();
       const uint32_t other = load_shared(words() + (threadIdx.x ^ 1));
       __syncwarp();
       store_shared(words() + threadIdx.x, other);
       store_global(p.out + threadIdx.x, load_shared(words() + threadIdx.x));
       __syncwarp();
       load_shared(words());
       __syncwarp();
       if (threadIdx.x == 9) store_shared(words(), load_shared(words()));
       uint4* rows = reinterpret_cast<uint4*>(words() + 32);
       uint32_t to[4];
       store_shared(rows + threadIdx.x, uint4{});
       __syncwarp();
       ldmatrix_x4(to, rows + (threadIdx.x ^ 1));
       __syncwarp();
       store_shared(rows + threadIdx.x, uint4{});
     }},
    {"uninitialised",
     [](const Probe& p) {
       store_global(p.out + 4 * threadIdx.x, load_shared(words() + threadIdx.x));
       const uint16_t half = load_shared(reinterpret_cast<uint16_t*>(words()) + threadIdx.x);
       store_global(p.out + 4 * threadIdx.x + 1, __float_as_uint(to_float(bfloat16{half})));
       store_global(p.out + 4 * threadIdx.x + 2, __float_as_uint(to_float(float16{half})));
     }},
    {"late copies",
     [](const Probe& p) {
       // Copies of what is written after they were issued, and waited for one after the other.
       uint32_t* from = p.out + 4;
       if (threadIdx.x != 0) return;
       for (int i = 0; i < 3; ++i) {
         cp_async_16(words() + 4 * i, from + 4 * i, 16);
         cp_async_commit();
       }
       cp_async_wait<3>();
       for (int i = 0; i < 3; ++i) store_global(from + 4 * i, 10u + i);
       cp_async_wait<2>();
       store_global(p.out, load_shared(words()));
       store_global(from, 20u);
       store_global(from + 4, 21u);
       cp_async_wait<1>();
       store_global(p.out + 1, load_shared(words() + 4));
       cp_async_wait<0>();
       store_global(p.out + 2, load_shared(words() + 8));
       store_global(p.out + 3, load_shared(words()));
     }},
    {"parts of copies",
     [](const Probe& p) {
       // What is not copied may lie anywhere, and is zero.
       if (threadIdx.x != 0) return;
       cp_async_16(words(), nullptr, 0);
       cp_async_16(words() + 4, p.in, 6);
       cp_async_commit();
       cp_async_wait<0>();
       for (int i = 0; i < 8; ++i) store_global(p.out + i, load_shared(words() + i));
     }},
    {"copy left behind", [](const Probe& p) { cp_async_16(words() + 4 * threadIdx.x, p.in, 16); }},

    {"copy not waited for",
     [](const Probe& p) {
       if (threadIdx.x != 0) return;
       for (int i = 0; i < 2; ++i) {
         cp_async_16(words() + 4 * i, p.in + 4 * i, 16);  // there: copy not waited for
         cp_async_commit();
       }
       cp_async_wait<1>();
       load_shared(words());
       load_shared(words() + 4);  // here: copy not waited for
     }},
    {"copy not committed",
     [](const Probe& p) {
       if (threadIdx.x != 0) return;
       cp_async_16(words(), p.in, 16);  // there: copy not committed
       cp_async_wait<0>();
       load_shared(words());  // here: copy not committed
     }},
    {"copy seen by others",
     [](const Probe& p) {
       if (threadIdx.x == 0) cp_async_16(words(), p.in, 16);  // there: copy seen by others
       cp_async_commit();
       __syncthreads();
       if (threadIdx.x == 0) cp_async_wait<0>();
       if (threadIdx.x == 40) load_shared(words());  // here: copy seen by others
     }},
    {"copy of 17 bytes", [](const Probe& p) { cp_async_16(words(), p.in, 17); }},       // here: copy of 17 bytes
    {"copy over the end", [](const Probe& p) { cp_async_16(words(), p.out + 8, 4); }},  // here: copy over the end
    {"read after write", [](const Probe&) { read_after_write(false); }},
    {"read after write in a warp",
     [](const Probe&) {
       store_shared(words() + threadIdx.x, 1u);   // there: read after write in a warp
       load_shared(words() + (threadIdx.x ^ 1));  // here: read after write in a warp
     }},
    {"shuffle between write and read",
     [](const Probe&) {
       store_shared(words() + threadIdx.x, 1u);  // there: shuffle between write and read
       __shfl_sync(~0u, 0, 0);
       load_shared(words() + (threadIdx.x ^ 1));  // here: shuffle between write and read
     }},
    {"mma between write and read",
     [](const Probe&) {
       const uint32_t a[4] = {};
       float sum[4] = {};
       store_shared(words() + threadIdx.x, 1u);  // there: mma between write and read
       mma_m16n8k16<bfloat16>(sum, a, 0, 0);
       load_shared(words() + (threadIdx.x ^ 1));  // here: mma between write and read
     }},
    {"ldmatrix after write in a warp",
     [](const Probe&) {
       uint4* rows = reinterpret_cast<uint4*>(words());
       uint32_t to[4];
       store_shared(rows + threadIdx.x, uint4{});  // there: ldmatrix after write in a warp
       ldmatrix_x4(to, rows + (threadIdx.x ^ 1));  // here: ldmatrix after write in a warp
     }},
    {"write after ldmatrix in a warp",
     [](const Probe&) {
       uint4* rows = reinterpret_cast<uint4*>(words());
       uint32_t to[4];
       ldmatrix_x4(to, rows + threadIdx.x);              // there: write after ldmatrix in a warp
       store_shared(rows + (threadIdx.x ^ 1), uint4{});  // here: write after ldmatrix in a warp
     }},
    {"write after read",
     [](const Probe&) {
       // The writer is also the last of the readers, and a __syncwarp of its warp does not help.
       if (threadIdx.x >= 32) __syncwarp();
       if (threadIdx.x != 0 && threadIdx.x != 33) return;
       for (int i = 0; i < 2; ++i) load_shared(words());  // there: write after read
       if (threadIdx.x == 33) store_shared(words(), 1u);  // here: write after read
     }},
    {"write after read in a warp",
     [](const Probe&) {
       if (threadIdx.x < 2) load_shared(words());
       __syncwarp();
       if (threadIdx.x < 2) load_shared(words());        // there: write after read in a warp
       if (threadIdx.x == 1) store_shared(words(), 1u);  // here: write after read in a warp
     }},
    {"write after write",
     [](const Probe&) {
       if (threadIdx.x % 32 == 0) store_shared(words(), 1u);  // here: write after write
     }},

    {"divergence",
     [](const Probe&) {
       if (threadIdx.x % 32 < 16) {
         __syncwarp();  // there: divergence
       } else {
         __shfl_sync(~0u, 0, 0);  // here: divergence
       }
     }},
    {"divergence of lines",
     [](const Probe&) {
       if (threadIdx.x % 32 < 16) {
         __syncwarp();  // there: divergence of lines
       } else {
         __syncwarp();  // here: divergence of lines
       }
     }},
    {"a lane ended",
     [](const Probe&) {
       if (threadIdx.x % 32 != 3) __syncwarp();  // here: a lane ended
     }},
    {"barrier not reached",
     [](const Probe&) {
       if (threadIdx.x < 32 || threadIdx.x == 40) __syncthreads();  // here: barrier not reached
     }},
    {"two barriers",
     [](const Probe&) {
       if (threadIdx.x < 32) {
         __syncthreads();  // there: two barriers
       } else {
         __syncthreads();  // here: two barriers
       }
     }},
    {"barrier against collective",
     [](const Probe&) {
       if (threadIdx.x == 0) {
         __syncthreads();  // there: barrier against collective
       } else {
         __syncwarp();  // here: barrier against collective
       }
     }},
    {"part of a warp", [](const Probe&) { __syncwarp(0xFFFF); }},         // here: part of a warp
    {"no such lane", [](const Probe&) { __shfl_xor_sync(~0u, 0, 32); }},  // here: no such lane

    {"misaligned global",
     [](const Probe& p) { load_global(reinterpret_cast<const uint4*>(p.in + 1)); }},  // here: misaligned global
    {"misaligned shared",
     [](const Probe&) { load_shared(reinterpret_cast<uint4*>(words() + 2)); }},      // here: misaligned shared
    {"misaligned copy", [](const Probe& p) { cp_async_16(words(), p.in + 1, 0); }},  // here: misaligned copy
    {"misaligned row",
     [](const Probe&) {
       uint32_t to[4];
       ldmatrix_x4(to, shared_memory() + 2 * (threadIdx.x == 9));  // here: misaligned row
     }},
    {"read-only", [](const Probe& p) { store_global(const_cast<uint32_t*>(p.in) + 1, 1u); }},  // here: read-only
    {"before a buffer", [](const Probe& p) { load_global(p.in - 1); }},                        // here: before a buffer
    {"past a buffer",
     [](const Probe& p) { load_global(reinterpret_cast<const uint16_t*>(p.in + 10)); }},  // here: past a buffer
    {"over the end of a buffer",
     [](const Probe& p) { load_global(reinterpret_cast<const uint4*>(p.in + 8)); }},  // here: over the end of a buffer
    {"past shared memory",
     [](const Probe& p) { store_shared(words() + p.shared_bytes / 4, 1u); }},  // here: past shared memory
    {"before shared memory", [](const Probe&) { load_shared(words() - 1); }},  // here: before shared memory
};

}  // namespace

void probe(const std::string& name, const uint32_t* in, uint32_t* out, dim3 grid, int threads, int shared_bytes) {
  const Probe p = {kProbes.at(name), in, out, shared_bytes};
  launch<probe_kernel>(grid, threads, shared_bytes, nullptr, p);
}

}  // namespace pyfused
