// Which kernels this machine runs.
#pragma once

#include "adapter_residual.h"

namespace pyfused {

/// Of the widest instruction set that the processor has and the library was built for.
const AdapterKernels& adapter_kernels();

}  // namespace pyfused
