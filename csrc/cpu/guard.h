// Parts of one allocation that a sanitizer tells apart.
#pragma once

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace pyfused {
namespace {

constexpr int64_t kGuard = 16;

/// Floats from one part to the next: whole lines of 64 bytes, and one that nobody may touch.
inline int64_t with_guard(int64_t count) { return (count + 15) / 16 * 16 + kGuard; }

/// The end of a part of `count` floats and its guard.
inline float* guarded(float* part, int64_t count) {
  float* end = part + with_guard(count);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(part, count * sizeof(float));
  __asan_poison_memory_region(part + count, (end - part - count) * sizeof(float));
#endif
  return end;
}

}  // namespace
}  // namespace pyfused
