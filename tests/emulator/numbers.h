// The 16-bit numbers of csrc/device.cuh.
#pragma once

#include <cstdint>
#include <cstring>

namespace pyfused {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

namespace emulator {

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace emulator

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return emulator::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
// By hand: without hardware support a conversion of _Float16 is a call, and each mma makes 384.
inline float to_float(float16 x) {
  constexpr uint32_t kInfinity = 0x7C00u << 13;
  constexpr uint32_t kRebias = (127 - 15) << 23;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7FFF) << 13;
  if (magnitude >= kInfinity) {
    magnitude |= 0xFFu << 23;
  } else if (magnitude >= 1u << 23) {
    magnitude += kRebias;
  } else {
    constexpr uint32_t kSmallest = kRebias + (1u << 23);
    const float difference = emulator::bit_cast<float>(magnitude + kSmallest) - emulator::bit_cast<float>(kSmallest);
    magnitude = emulator::bit_cast<uint32_t>(difference);
  }
  return emulator::bit_cast<float>(sign | magnitude);
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  const auto bits = emulator::bit_cast<uint32_t>(x);
  if (x != x) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline float16 from_float<float16>(float x) {
  return {emulator::bit_cast<uint16_t>(static_cast<_Float16>(x))};
}

template <class T>
uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(from_float<T>(high).bits) << 16 | from_float<T>(low).bits;
}

}  // namespace pyfused
