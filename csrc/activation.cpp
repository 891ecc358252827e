#include "activation.h"

#include <stdexcept>

namespace pyfused {

Activation activation_named(const std::string& name) {
  Activation phi;
  if (name == "identity") {
    phi.slope = 1.0f;
  } else if (name == "leaky_relu") {
    phi.slope = 0.01f;
  } else if (name == "gelu") {
    phi.family = Activation::kGelu;
  } else if (name == "silu" || name == "quick_gelu" || name == "gelu_tanh") {
    // gelu_tanh is one of these because (1 + tanh u) / 2 = sigmoid(2 u).
    phi.family = Activation::kSigmoid;
    phi.linear = name == "silu" ? 1.0f : name == "quick_gelu" ? 1.702f : 1.5957691216057308f;
    phi.cubic = name == "gelu_tanh" ? 1.5957691216057308f * 0.044715f : 0.0f;
  } else if (name != "relu") {
    throw std::invalid_argument("unknown activation " + name);
  }
  return phi;
}

}  // namespace pyfused
