// Activations and their slopes, in float32.
#pragma once

#include <cmath>
#include <type_traits>

#include "activation.h"
#include "device.cuh"

namespace pyfused {

/// phi(h) and phi'(h), which at 0 is as torch has it.
struct Activated {
  float value, slope;
};

template <Activation::Family kFamily>
__device__ inline Activated activate(const Activation& phi, float h) {
  if constexpr (kFamily == Activation::kLinear) {
    // NaN stays NaN, and -infinity times a slope of 0 is 0.
    const float below = phi.slope == 0.0f ? 0.0f : phi.slope * h;
    return {h < 0.0f ? below : h, h > 0.0f ? 1.0f : phi.slope};
  } else if constexpr (kFamily == Activation::kGelu) {
    // 1 - erf(x) = P(t) exp(-x^2), t = 1 / (1 + 0.3275911 x), to 1.5e-7 (Abramowitz and Stegun 7.1.26): less than a
    // tenth of float16's rounding of phi, and the exponential is the slope's too.
    const float density = expf(-0.5f * h * h), t = 1.0f / (1.0f + 0.23164190f * fabsf(h));
    const float tail = 0.5f * density * t *
        (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const float share = h < 0.0f ? tail : 1.0f - tail;
    return {h * share, share + h * 0.3989422804014327f * density};
  } else {
    const float share = 1.0f / (1.0f + expf(-h * (phi.linear + phi.cubic * h * h)));
    return {h * share, share + h * share * (1.0f - share) * (phi.linear + 3.0f * phi.cubic * h * h)};
  }
}

/// Calls `body` with the family as a compile-time constant: a switch outside its loops.
template <class Body>
__device__ inline void with_family(const Activation& phi, const Body& body) {
  switch (phi.family) {
    case Activation::kLinear: return body(std::integral_constant<Activation::Family, Activation::kLinear>{});
    case Activation::kGelu: return body(std::integral_constant<Activation::Family, Activation::kGelu>{});
    default: return body(std::integral_constant<Activation::Family, Activation::kSigmoid>{});
  }
}

}  // namespace pyfused
