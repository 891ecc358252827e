// Implementations of the schemas that pyfused/ops and pyfused/cpu define in the namespace pyfused_cpu.
#include <torch/csrc/stable/library.h>

#include "operators.h"

STABLE_TORCH_LIBRARY_IMPL(pyfused_cpu, CPU, library) {
  library.impl("adapter_residual_fwd", TORCH_BOX(&pyfused::adapter_residual_fwd));
  library.impl("adapter_residual_bwd", TORCH_BOX(&pyfused::adapter_residual_bwd));
  library.impl("low_rank_fwd", TORCH_BOX(&pyfused::low_rank_fwd));
  library.impl("low_rank_bwd", TORCH_BOX(&pyfused::low_rank_bwd));
}
