// CUDA for a host compiler: what csrc/device.cuh and csrc/launch.h need to run kernels on a CPU. Blocks run one after
// the other in random order, their threads as fibers under a random schedule that a seed determines; every access is
// checked. One launch runs at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "numbers.h"

namespace pyfused {

struct Device;

namespace emulator {

/// A place in a kernel's source; as a default argument, that of the call.
struct Source {
  const char* file;
  int line;
  static constexpr Source here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

/// An operation of a kernel, as messages name it.
struct Site {
  const char* operation;
  Source source;

  // The names are literals of one source.
  bool operator!=(const Site& other) const {
    return operation != other.operation || source.file != other.source.file || source.line != other.source.line;
  }
};

/// Sets the device that is played, and the seed of the order in which threads run.
void emulate(const Device& device, uint64_t seed);

/// A buffer that kernels may read, and write if `writable`; they may touch no other memory but the block's own.
void expose(const void* at, size_t bytes, bool writable);

/// Withdraws all of them.
void clear();

/// What the names below are made of. Each call is one thread's; the first two and `wait` of the copies are its own
/// affair, the last four rendezvous.
char* shared_buffer();
void check_shared(const void* at, int bytes, bool write, const Site& site);
void check_global(const void* at, int bytes, bool write, const Site& site);
void copy(void* shared, const void* global, int bytes, const Site& site);
void commit_copies();
void wait_for_copies(int pending);
void barrier(const Site& site);
void sync_warp(uint32_t mask, const Site& site);
/// This thread's lane gives `bits`, and gets those of lane `from`.
uint64_t shuffle(uint32_t mask, uint64_t bits, int from, const Site& site);
void ldmatrix(uint32_t (&to)[4], const void* row, bool transposed, const Site& site);
void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*to_float)(uint16_t),
         const Site& site);

}  // namespace emulator

}  // namespace pyfused

#include "cuda_names.h"

namespace pyfused {

namespace emulator {

void run(const std::string& kernel, dim3 grid, int threads, int shared_bytes, void (*thread)(const void*),
         const void* argument);

/// Runs `thread()` for every thread of the grid. Throws std::runtime_error at the first thing that CUDA would refuse,
/// or that would be undefined there.
template <class Thread>
void launch(const std::string& kernel, dim3 grid, int threads, int shared_bytes, const Thread& thread) {
  run(kernel, grid, threads, shared_bytes, [](const void* it) { (*static_cast<const Thread*>(it))(); }, &thread);
}

template <class V>
constexpr bool kIsAccess = sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16;

// By memcpy, since one kernel's bytes are another line's numbers.
template <class V>
V read(const V* at) {
  V value;
  std::memcpy(&value, at, sizeof(V));
  return value;
}
template <class V>
void write(V* at, const V& value) {
  std::memcpy(at, &value, sizeof(V));
}

}  // namespace emulator

inline char* shared_memory() { return emulator::shared_buffer(); }

template <class V>
V load_global(const V* at, emulator::Source source = emulator::Source::here()) {
  static_assert(emulator::kIsAccess<V> || sizeof(V) == 1, "load_global: 1, 2, 4, 8 or 16 bytes");
  emulator::check_global(at, sizeof(V), false, {"load_global", source});
  return emulator::read(at);
}
template <class V>
void store_global(V* at, V value, emulator::Source source = emulator::Source::here()) {
  static_assert(emulator::kIsAccess<V> || sizeof(V) == 1, "store_global: 1, 2, 4, 8 or 16 bytes");
  emulator::check_global(at, sizeof(V), true, {"store_global", source});
  emulator::write(at, value);
}
template <class V>
V load_shared(const V* at, emulator::Source source = emulator::Source::here()) {
  static_assert(emulator::kIsAccess<V>, "load_shared: 2, 4, 8 or 16 bytes, as races are looked for in pairs of bytes");
  emulator::check_shared(at, sizeof(V), false, {"load_shared", source});
  return emulator::read(at);
}
template <class V>
void store_shared(V* at, V value, emulator::Source source = emulator::Source::here()) {
  static_assert(emulator::kIsAccess<V>, "store_shared: 2, 4, 8 or 16 bytes, as races are looked for in pairs of bytes");
  emulator::check_shared(at, sizeof(V), true, {"store_shared", source});
  emulator::write(at, value);
}

inline void cp_async_16(void* shared, const void* global, int bytes,
                        emulator::Source source = emulator::Source::here()) {
  emulator::copy(shared, global, bytes, {"cp_async_16", source});
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  static_assert(kPending >= 0);
  emulator::wait_for_copies(kPending);
}

inline void ldmatrix_x4(uint32_t (&to)[4], const void* row, emulator::Source source = emulator::Source::here()) {
  emulator::ldmatrix(to, row, false, {"ldmatrix_x4", source});
}
inline void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row, emulator::Source source = emulator::Source::here()) {
  emulator::ldmatrix(to, row, true, {"ldmatrix_x4_trans", source});
}

template <class T>
void mma_m16n8k16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  emulator::Source source = emulator::Source::here()) {
  const auto to_float = [](uint16_t bits) { return pyfused::to_float(T{bits}); };
  emulator::mma(sum, a, b0, b1, to_float, {"mma_m16n8k16", source});
}

}  // namespace pyfused
