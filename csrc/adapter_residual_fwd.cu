// Starts adapter_residual's forward.
#include "adapter_residual.cuh"
#include "adapter_residual_config.cuh"

namespace pyfused {

void adapter_forward(const AdapterForward& parameters, void* stream) {
  with_bottleneck(parameters, [&](auto bottleneck, dim3 grid, const AdapterForward& p) {
    using B = decltype(bottleneck);
    launch<adapter_fwd_kernel<B>>(grid, B::kThreads, B::shared_bytes(p.channels, p.stages), stream, p);
  });
}

}  // namespace pyfused
