// Activations and their slopes, of tiles.
#pragma once

#include "../activation.h"
#include "simd.h"
#include "tiles.h"

namespace pyfused {
namespace {

struct Activated {
  Vec value, slope;
};

template <Activation::Family kFamily>
INLINE Activated activated(const Activation& phi, Vec h) {
  if constexpr (kFamily == Activation::kLinear) {
    // NaN stays NaN, and -infinity times a slope of 0 is 0.
    const Vec below = phi.slope == 0.0f ? Vec{} : splat(phi.slope) * h;
    return {select(h < Vec{}, below, h), select(h > Vec{}, splat(1.0f), splat(phi.slope))};
  } else if constexpr (kFamily == Activation::kGelu) {
    // 1 - erf(x) = P(t) exp(-x^2), t = 1 / (1 + 0.3275911 x), to 1.5e-7 (Abramowitz and Stegun 7.1.26).
    const Vec density = exp(splat(-0.5f) * h * h);
    const Vec t = splat(1.0f) / (splat(1.0f) + splat(0.23164190f) * select(h < Vec{}, -h, h));
    Vec p = splat(1.061405429f);
    p = p * t + splat(-1.453152027f);
    p = p * t + splat(1.421413741f);
    p = p * t + splat(-0.284496736f);
    p = p * t + splat(0.254829592f);
    const Vec tail = splat(0.5f) * density * t * p;
    const Vec share = select(h < Vec{}, tail, splat(1.0f) - tail);
    return {h * share, share + h * splat(0.3989422804014327f) * density};
  } else {
    // The factor first: without it h^2 may be more than float32 holds.
    const Vec linear = splat(phi.linear), curved = splat(phi.cubic) * h * h;
    const Vec share = splat(1.0f) / (splat(1.0f) + exp(-h * (linear + curved)));
    return {h * share, share + h * share * (splat(1.0f) - share) * (linear + splat(3.0f) * curved)};
  }
}

/// Calls body(a constant of the family).
template <class Body>
INLINE void with_family(const Activation& phi, Body&& body) {
  switch (phi.family) {
    case Activation::kLinear: return body(std::integral_constant<Activation::Family, Activation::kLinear>{});
    case Activation::kGelu: return body(std::integral_constant<Activation::Family, Activation::kGelu>{});
    default: return body(std::integral_constant<Activation::Family, Activation::kSigmoid>{});
  }
}

/// a = k phi(h), where k is one number for each row, or null for 1.
void activate(const Activation& phi, int64_t rows, int64_t columns, Tile h, const float* k, Tile a) {
  with_family(phi, [&](auto family) INLINE_LAMBDA {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; c += kLanes) {
        const Vec value = activated<decltype(family)::value>(phi, load(h.data + r * h.pitch + c)).value;
        store(a.data + r * a.pitch + c, k ? splat(k[r]) * value : value);
      }
  });
}

/// t = k mask t phi'(h), and a = k mask phi(h) where a has data; k is one number for each row.
void differentiate(const Activation& phi, int64_t rows, int64_t columns, Tile h, Tile mask, const float* k, Tile t,
                   Tile a) {
  with_family(phi, [&](auto family) INLINE_LAMBDA {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; c += kLanes) {
        const Activated phi_of = activated<decltype(family)::value>(phi, load(h.data + r * h.pitch + c));
        Vec factor = splat(k[r]);
        if (mask.data) factor *= load(mask.data + r * mask.pitch + c);
        float* there = t.data + r * t.pitch + c;
        store(there, factor * load(there) * phi_of.slope);
        if (a.data) store(a.data + r * a.pitch + c, factor * phi_of.value);
      }
  });
}

}  // namespace
}  // namespace pyfused
