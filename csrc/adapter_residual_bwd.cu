// Starts adapter_residual's backward before and after the sums over rows.
#include "adapter_residual.cuh"
#include "adapter_residual_config.cuh"

namespace pyfused {

void adapter_backward_rows(const AdapterBackwardRows& parameters, void* stream) {
  with_bottleneck(parameters, [&](auto bottleneck, dim3 grid, const AdapterBackwardRows& p) {
    using B = decltype(bottleneck);
    launch<adapter_bwd_rows_kernel<B>>(grid, B::kThreads, B::shared_bytes(p.channels, p.stages), stream, p);
  });
}

void adapter_gradients(const AdapterGradients& p, void* stream) {
  const dim3 grid((p.channels + (p.width + kWarp - 1) / kWarp + 3) / 4);
  const int shared_bytes = 4 * kWarp;
  if (p.number == Number::kFloat16) {
    launch<adapter_bwd_gradients_kernel<float16>>(grid, 128, shared_bytes, stream, p);
  } else {
    launch<adapter_bwd_gradients_kernel<bfloat16>>(grid, 128, shared_bytes, stream, p);
  }
}

}  // namespace pyfused
