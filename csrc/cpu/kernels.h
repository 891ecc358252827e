// Which kernels this machine runs: of the widest instruction set that the processor has and the library was built for.
#pragma once

#include "adapter_residual.h"
#include "low_rank.h"

namespace pyfused {

const AdapterKernels& adapter_kernels();
const LowRankKernels& low_rank_kernels();

}  // namespace pyfused
