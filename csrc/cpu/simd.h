// Vectors of float32 by the compiler's extension, as wide as the instruction set that this file is compiled for.
//
// What is here and in the files that include it is compiled once for each instruction set: all of it is in unnamed
// namespaces, and calls nothing of the standard library. The linker would else take one copy of such a function for all
// of them, and a machine could meet instructions that it lacks.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../types.h"

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace pyfused {
namespace {

// A turn of the innermost loop of a product holds kRows x kVectors vectors in registers.
#if defined(PYFUSED_LANES)
constexpr int kLanes = PYFUSED_LANES, kRows = 6, kVectors = 4;
#elif defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 6, kVectors = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6, kVectors = 2;
#else
constexpr int kLanes = 4, kRows = 4, kVectors = 2;
#endif
constexpr int kPanel = kLanes * kVectors;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t Int __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Unsigned __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));
typedef float Unaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t UnalignedHalf __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

INLINE Vec load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
INLINE void store(float* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }
// A loop over the lanes would be compiled to as many inserts.
INLINE Vec splat(float x) { return x - Vec{}; }
INLINE Vec select(Int condition, Vec yes, Vec no) { return condition ? yes : no; }
INLINE Vec bits_to_float(Unsigned bits) { return reinterpret_cast<Vec>(bits); }
INLINE Unsigned float_to_bits(Vec x) { return reinterpret_cast<Unsigned>(x); }

INLINE float sum(Vec v) {
  float s = 0.0f;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}

// Numbers of 16 bits. Rounding is to nearest even, NaN stays NaN.

INLINE Vec from_bfloat16(Half x) { return bits_to_float(__builtin_convertvector(x, Unsigned) << 16); }

INLINE Half to_bfloat16(Vec x) {
  const Unsigned bits = float_to_bits(x);
  const Unsigned rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, Half);
}

INLINE Vec from_float16(Half x) {
#if defined(__AVX512F__) && !defined(PYFUSED_LANES)
  return reinterpret_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(x)));
#elif defined(__F16C__) && !defined(PYFUSED_LANES)
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(x)));
#else
  const Unsigned wide = __builtin_convertvector(x, Unsigned), magnitude = wide & 0x7fff;
  // Its exponent is off by 112, of numbers below the normal ones too.
  const Vec scaled = bits_to_float(magnitude << 13) * splat(5.192296858534828e33f);
  const Unsigned bits = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : float_to_bits(scaled);
  return bits_to_float(bits | ((wide & 0x8000) << 16));
#endif
}

INLINE Half to_float16(Vec x) {
#if defined(__AVX512F__) && !defined(PYFUSED_LANES)
  return reinterpret_cast<Half>(_mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && !defined(PYFUSED_LANES)
  return reinterpret_cast<Half>(_mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  const Unsigned bits = float_to_bits(x), magnitude = bits & 0x7fffffff;
  // Below the normal numbers an addition rounds: 0.5 has the last bit that is kept at 2^-24.
  const Unsigned small = float_to_bits(bits_to_float(magnitude) + splat(0.5f)) - 0x3f000000;
  const Unsigned normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  Unsigned half = magnitude < 0x38800000 ? small : normal;
  half = magnitude >= 0x477ff000 ? Unsigned{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? ((magnitude >> 13) & 0x3ff) | 0x7e00 : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000), Half);
#endif
}

// kLanes elements of a type, widened; `Element` is the type that memory holds.

template <Number kNumber>
struct Elements {
  typedef uint16_t Element;
  static INLINE Half raw(const uint16_t* p) { return *reinterpret_cast<const UnalignedHalf*>(p); }
  static INLINE Vec load(const uint16_t* p) {
    return kNumber == Number::kBFloat16 ? from_bfloat16(raw(p)) : from_float16(raw(p));
  }
  static INLINE void store(uint16_t* p, Vec v) {
    *reinterpret_cast<UnalignedHalf*>(p) = kNumber == Number::kBFloat16 ? to_bfloat16(v) : to_float16(v);
  }
};
template <>
struct Elements<Number::kFloat32> {
  typedef float Element;
  static INLINE Vec load(const float* p) { return pyfused::load(p); }
  static INLINE void store(float* p, Vec v) { pyfused::store(p, v); }
};

// The first n elements, from 1 to kLanes of them, zeros behind. With AVX-512, and of float32 with AVX2, by a mask: through
// a copy of the elements the load would wait for the stores.
#if defined(__AVX512F__) && !defined(PYFUSED_LANES)

template <Number kNumber>
INLINE Vec load_some(const typename Elements<kNumber>::Element* p, int64_t n) {
  const uint32_t mask = (1u << least(n, kLanes)) - 1;
  if constexpr (kNumber == Number::kFloat32) {
    return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(mask, p));
  } else {
    const Half raw = reinterpret_cast<Half>(_mm256_maskz_loadu_epi16(mask, p));
    return kNumber == Number::kBFloat16 ? from_bfloat16(raw) : from_float16(raw);
  }
}
template <Number kNumber>
INLINE void store_some(typename Elements<kNumber>::Element* p, Vec v, int64_t n) {
  const uint32_t mask = (1u << least(n, kLanes)) - 1;
  if constexpr (kNumber == Number::kFloat32) {
    _mm512_mask_storeu_ps(p, mask, reinterpret_cast<__m512>(v));
  } else {
    const Half raw = kNumber == Number::kBFloat16 ? to_bfloat16(v) : to_float16(v);
    _mm256_mask_storeu_epi16(p, mask, reinterpret_cast<__m256i>(raw));
  }
}

#else

#if defined(__AVX2__) && !defined(PYFUSED_LANES)
/// All bits of the first n lanes.
INLINE __m256i lanes(int64_t n) {
  alignas(32) static const int32_t kOnes[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kOnes + kLanes - n));
}
#endif

template <Number kNumber>
INLINE Vec load_some(const typename Elements<kNumber>::Element* p, int64_t n) {
  if (n >= kLanes) return Elements<kNumber>::load(p);
#if defined(__AVX2__) && !defined(PYFUSED_LANES)
  if constexpr (kNumber == Number::kFloat32) return reinterpret_cast<Vec>(_mm256_maskload_ps(p, lanes(n)));
#endif
  typename Elements<kNumber>::Element copy[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) copy[i] = p[i];
  return Elements<kNumber>::load(copy);
}
template <Number kNumber>
INLINE void store_some(typename Elements<kNumber>::Element* p, Vec v, int64_t n) {
  if (n >= kLanes) return Elements<kNumber>::store(p, v);
#if defined(__AVX2__) && !defined(PYFUSED_LANES)
  if constexpr (kNumber == Number::kFloat32) return _mm256_maskstore_ps(p, lanes(n), reinterpret_cast<__m256>(v));
#endif
  typename Elements<kNumber>::Element copy[kLanes];
  Elements<kNumber>::store(copy, v);
  for (int64_t i = 0; i < n; ++i) p[i] = copy[i];
}

#endif

/// Calls body(a constant of the type).
template <class Body>
INLINE void with_number(Number number, Body&& body) {
  switch (number) {
    case Number::kFloat32: return body(std::integral_constant<Number, Number::kFloat32>{});
    case Number::kFloat16: return body(std::integral_constant<Number, Number::kFloat16>{});
    default: return body(std::integral_constant<Number, Number::kBFloat16>{});
  }
}

#if defined(__clang__)
#define PYFUSED_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PYFUSED_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Int{__VA_ARGS__})
#endif

/// Of a and b, whose rows are kDistance apart in a square of kLanes, the blocks that lie off the diagonal change places.
template <int kDistance, int... kLane>
INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, kLane...>) {
  const Vec low = PYFUSED_SHUFFLE(a, b, (kLane & kDistance ? kLanes + kLane - kDistance : kLane)...);
  b = PYFUSED_SHUFFLE(a, b, (kLane & kDistance ? kLanes + kLane : kLane + kDistance)...);
  a = low;
}

template <int kDistance>
INLINE void transpose_by(Vec (&square)[kLanes]) {
  if constexpr (kDistance < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (!(i & kDistance)) {
        exchange<kDistance>(square[i], square[i + kDistance], std::make_integer_sequence<int, kLanes>{});
      }
    transpose_by<2 * kDistance>(square);
  }
}
INLINE void transpose(Vec (&square)[kLanes]) { transpose_by<1>(square); }

/// exp(x) to 1e-7 of it (Cephes), with x cut to where float32 holds it.
INLINE Vec exp(Vec x) {
  x = select(x < splat(-87.3f), splat(-87.3f), x);
  x = select(x > splat(88.3f), splat(88.3f), x);
  // Adding 1.5 2^23 rounds to an integer.
  const Vec shift = splat(12582912.0f);
  const Vec n = (x * splat(1.44269504088896341f) + shift) - shift;
  const Vec r = (x - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  return p * reinterpret_cast<Vec>((__builtin_convertvector(n, Int) + 127) << 23);
}

}  // namespace
}  // namespace pyfused
