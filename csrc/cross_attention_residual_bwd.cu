// Starts cross_attention_residual's backward: rows, weights of the rows, gradients. The sums over rows between them are
// adapter_residual's.
#include "cross_attention_backward.cuh"
#include "cross_attention_gradients.cuh"
#include "cross_attention_residual_config.cuh"

namespace pyfused {

int cross_attention_tiles(const CrossAttention& p) {
  int tiles = 0;
  with_attention_tile(p, [&](auto tile, int) {
    constexpr int kRows = decltype(tile)::kRows;
    tiles = static_cast<int>(p.batch * ((p.length + kRows - 1) / kRows));
  });
  return tiles;
}

void cross_attention_backward_rows(const CrossAttentionBackwardRows& parameters, void* stream) {
  over_tiles(parameters, [&](auto tile, dim3 grid, int shared_bytes, const CrossAttentionBackwardRows& p) {
    using B = decltype(tile);
    launch<cross_attention_bwd_rows_kernel<B>>(grid, B::kThreads, shared_bytes, stream, p);
  });
}

void cross_attention_weigh(const CrossAttentionBackwardRows& p, void* stream) {
  const int64_t blocks = p.batch * ((p.length + kWeighedRows - 1) / kWeighedRows);
  const auto start = [&](auto type) {
    launch<cross_attention_bwd_weigh_kernel<decltype(type)>>(dim3(static_cast<unsigned>(blocks)), kWeighThreads,
                                                             kWeighBytes, stream, p);
  };
  p.number == Number::kFloat16 ? start(float16{}) : start(bfloat16{});
}

void sum_parts(const SumOfParts& p, void* stream) {
  const int64_t blocks = (p.groups * p.count + kSumThreads - 1) / kSumThreads;
  launch<cross_attention_bwd_sum_kernel>(dim3(static_cast<unsigned>(blocks)), kSumThreads, 0, stream, p);
}

void cross_attention_gradients(const CrossAttentionGradients& p, void* stream) {
  const int64_t channel_blocks = (p.channels + kWarp - 1) / kWarp, column_blocks = (p.columns + kWarp - 1) / kWarp;
  const int64_t blocks = p.contexts * channel_blocks + p.logit_groups * column_blocks;
  launch<cross_attention_bwd_gradients_kernel>(dim3(static_cast<unsigned>(blocks)), kGradientWarps * kWarp,
                                               kGradientBytes, stream, p);
}

}  // namespace pyfused
