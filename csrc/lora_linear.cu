// Launch configurations and launchers of lora_linear. None has been timed on a GPU yet.
#include "lora_linear.cuh"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "gemm_cost.h"
#include "launch.h"

namespace pyfused {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Calls `body` with the rank, padded, as a compile-time constant.
template <class Body>
void with_rank(int rank, const Body& body) {
  if (rank <= 16) return body(std::integral_constant<int, 16>{});
  if (rank <= 64) return body(std::integral_constant<int, 64>{});
  throw std::runtime_error("lora_linear: a rank must be at most 64, got " + std::to_string(rank));
}

template <class Body>
void with_type(Number number, const Body& body) {
  return number == Number::kFloat16 ? body(float16{}) : body(bfloat16{});
}

/// What the busiest multiprocessor does for y (M, N), whose tiles make their own P.
template <class G>
double cost(const LoraGemm& g, const Device& device) {
  const int64_t tiles = g.batch * divide_up(g.length, G::kM) * std::max<int64_t>(1, divide_up(g.n, G::kN));
  const int k = static_cast<int>(divide_up(g.k, G::kK)) * G::kK;
  const int operand_bytes = sizeof(typename G::T) * (G::kM + G::kN);
  return gemm_cost(tiles, device.multiprocessors, k, G::kM, G::kN, G::kRank, operand_bytes,
                   products_of_mma_sync(device.capability));
}

template <class G>
void start(LoraGemm g, void* stream) {
  g.tiles_l = static_cast<int>(divide_up(g.length, G::kM));
  g.tiles_m = static_cast<int>(g.batch * g.tiles_l);
  g.tiles_n = static_cast<int>(std::max<int64_t>(1, divide_up(g.n, G::kN)));
  const int64_t blocks = static_cast<int64_t>(g.tiles_m) * g.tiles_n;
  launch<lora_gemm_kernel<G>>(dim3(static_cast<unsigned>(blocks)), G::kThreads, G::kSharedBytes, stream, g);
}

/// Starts the tile of least cost, among those that fit on chip.
template <class T, int kRank, bool kFlipped>
void start_best(const LoraGemm& g, void* stream) {
  using Large = GemmTile<T, 128, 256, 4, kRank, kFlipped>;
  using Middle = GemmTile<T, 128, 128, 4, kRank, kFlipped>;
  using Small = GemmTile<T, 64, 64, 2, kRank, kFlipped>;
  const Device& device = current_device();
  struct Choice {
    double cost;
    void (*start)(LoraGemm, void*);
  };
  Choice best{cost<Small>(g, device), start<Small>};
  const auto consider = [&](auto tile) {
    using G = decltype(tile);
    if (G::kSharedBytes > device.shared_memory || cost<G>(g, device) >= best.cost) return;
    best = {cost<G>(g, device), start<G>};
  };
  consider(Middle{});
  // With 64 columns of P its registers do not suffice.
  if constexpr (kRank <= 16) consider(Large{});
  best.start(g, stream);
}

}  // namespace

void lora_gemm(const LoraGemm& parameters, void* stream) {
  LoraGemm g = parameters;
  // Without N there is no W either: nothing of it is read.
  if (g.n == 0) g.weight.access = Access::kChannels;
  const bool flipped = runs_down(g.weight);
  if (flipped) g.weight = transposed(g.weight);
  with_rank(g.rank, [&](auto rank) {
    with_type(g.x.number, [&](auto type) {
      using T = decltype(type);
      flipped ? start_best<T, rank.value, true>(g, stream) : start_best<T, rank.value, false>(g, stream);
    });
  });
}

void lay_out_parts(LoraSums& sums) {
  using S = SumTile<bfloat16, 16>;
  sums.tiles_l = static_cast<int>(divide_up(sums.length, S::kM));
  with_rank(sums.rank, [&](auto rank) { sums.pitch = rank.value; });
  for (int i = 0; i < sums.count; ++i) {
    LoraSum& sum = sums.sums[i];
    sum.tiles_c = static_cast<int>(divide_up(sum.channels, S::kC));
    // Four blocks for every multiprocessor.
    const int64_t tiles = sums.batch * sums.tiles_l;
    const int64_t wanted = divide_up(4 * current_device().multiprocessors, sum.tiles_c);
    sum.steps = static_cast<int>(divide_up(tiles, std::clamp<int64_t>(wanted, 1, 64)));
    sum.splits = sum.steps == 0 ? 0 : static_cast<int>(divide_up(tiles, sum.steps));
  }
}

int64_t floats_of_parts(const LoraSums& sums, int i) {
  return static_cast<int64_t>(sums.sums[i].splits) * sums.sums[i].tiles_c * SumTile<bfloat16, 16>::kC * sums.pitch;
}

void lora_sums(const LoraSums& p, void* stream) {
  unsigned blocks = 0, gradient_blocks = 0;
  for (int i = 0; i < p.count; ++i) {
    blocks = std::max(blocks, static_cast<unsigned>(p.sums[i].tiles_c * p.sums[i].splits));
    const int64_t numbers = static_cast<int64_t>(p.sums[i].channels) * p.pitch;
    gradient_blocks = std::max(gradient_blocks, static_cast<unsigned>(divide_up(numbers, kGradientThreads)));
  }
  const unsigned count = static_cast<unsigned>(p.count);
  if (blocks > 0) {
    with_rank(p.rank, [&](auto rank) {
      with_type(p.sums[0].t.number, [&](auto type) {
        using S = SumTile<decltype(type), rank.value>;
        launch<lora_sums_kernel<S>>(dim3(blocks, count), S::kThreads, S::kSharedBytes, stream, p);
      });
    });
  }
  launch<lora_gradients_kernel<SumTile<bfloat16, 16>::kC>>(dim3(gradient_blocks, count), kGradientThreads, 0, stream,
                                                           p);
}

}  // namespace pyfused
