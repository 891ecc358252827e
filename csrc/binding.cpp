// Implementations of the schemas that pyfused/ops defines in the namespace pyfused_cuda: a function of operators.h each.
#include <torch/csrc/stable/library.h>

#include "operators.h"

// The emulator's build serves CPU tensors under the same names.
#ifdef PYFUSED_EMULATOR
#define PYFUSED_DISPATCH_KEY CPU
#else
#define PYFUSED_DISPATCH_KEY CUDA
#endif

#define PYFUSED_IMPL(name) library.impl(#name, TORCH_BOX(&pyfused::name))

STABLE_TORCH_LIBRARY_IMPL(pyfused_cuda, PYFUSED_DISPATCH_KEY, library) {
  PYFUSED_IMPL(adapter_residual_fwd);
  PYFUSED_IMPL(adapter_residual_bwd);
  PYFUSED_IMPL(cross_attention_residual_fwd);
  PYFUSED_IMPL(cross_attention_residual_bwd);
  PYFUSED_IMPL(lora_linear_fwd);
  PYFUSED_IMPL(lora_linear_bwd);
}
