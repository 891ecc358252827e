// Activations as kernels take them.
#pragma once

#include <string>

namespace pyfused {

/// Three families of phi(h), so that one kernel serves all seven activations without seven copies of its loops:
/// kLinear is `slope` h below 0 and h elsewhere, kGelu is by erf, kSigmoid is h sigmoid(linear h + cubic h^3).
struct Activation {
  enum Family : int { kLinear, kGelu, kSigmoid };
  Family family = kLinear;
  float slope = 0.0f;
  float linear = 0.0f;
  float cubic = 0.0f;
};

/// By its public name; throws std::invalid_argument for another.
Activation activation_named(const std::string& name);

}  // namespace pyfused
