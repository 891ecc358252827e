// Starts adapter_residual's backward: rows, sums over rows, gradients.
#include <algorithm>

#include "adapter_residual.cuh"
#include "adapter_residual_config.cuh"

namespace pyfused {
namespace {

constexpr int kSumsRows = 64, kSumsChannels = 64;

int sums_tiles_l(const Adapter& p) { return static_cast<int>((p.length + kSumsRows - 1) / kSumsRows); }

/// Columns of the middle that a block of the sums takes.
int sums_hidden(const Adapter& p) { return p.width <= 32 ? 32 : 64; }

}  // namespace

void lay_out_parts(AdapterBackwardSums& p) {
  // As many as give every multiprocessor two blocks.
  const int64_t blocks = static_cast<int64_t>((p.channels + kSumsChannels - 1) / kSumsChannels) *
                         ((p.width + sums_hidden(p) - 1) / sums_hidden(p));
  const int64_t wanted = (2 * current_device().multiprocessors + blocks - 1) / blocks;
  p.splits = static_cast<int>(std::max<int64_t>(1, std::min(p.batch * sums_tiles_l(p), wanted)));
  p.pitch = (p.width + 7) / 8 * 8;
  p.part_size = 2 * static_cast<int64_t>(p.channels) * p.pitch + p.pitch + 2 * p.channels;
}

void adapter_backward_rows(const AdapterBackwardRows& parameters, void* stream) {
  with_bottleneck(parameters, [&](auto bottleneck, dim3 grid, const AdapterBackwardRows& p) {
    using B = decltype(bottleneck);
    launch<adapter_bwd_rows_kernel<B>>(grid, B::kThreads, B::shared_bytes(p.channels, p.stages), stream, p);
  });
}

void adapter_backward_sums(const AdapterBackwardSums& parameters, void* stream) {
  AdapterBackwardSums p = parameters;
  p.tiles_l = sums_tiles_l(p);
  const int hidden = sums_hidden(p);
  const dim3 grid((p.channels + kSumsChannels - 1) / kSumsChannels, (p.width + hidden - 1) / hidden, p.splits);
  const auto start = [&](auto width, auto type) {
    using S = Sums<decltype(type), width.value>;
    p.stages = 3;
    while (p.stages > 2 && S::shared_bytes(p.stages) > current_device().shared_memory) --p.stages;
    launch<adapter_bwd_sums_kernel<decltype(type), width.value>>(grid, S::kThreads, S::shared_bytes(p.stages), stream,
                                                                 p);
  };
  const auto with_type = [&](auto width) {
    return p.number == Number::kFloat16 ? start(width, float16{}) : start(width, bfloat16{});
  };
  hidden == 32 ? with_type(std::integral_constant<int, 32>{}) : with_type(std::integral_constant<int, 64>{});
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
