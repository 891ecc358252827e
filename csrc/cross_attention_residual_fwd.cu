// Starts cross_attention_residual's forward.
#include "cross_attention_residual_config.cuh"

namespace pyfused {

void cross_attention_forward(const CrossAttentionForward& parameters, void* stream) {
  over_tiles(parameters, [&](auto tile, dim3 grid, int shared_bytes, const CrossAttentionForward& p) {
    using B = decltype(tile);
    launch<cross_attention_fwd_kernel<B>>(grid, B::kThreads, shared_bytes, stream, p);
  });
}

}  // namespace pyfused
