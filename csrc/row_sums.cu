// Starts the sums over rows.
#include "row_sums.cuh"

#include <algorithm>

#include "launch.h"

namespace pyfused {
namespace {

// Whatever the type and the columns, a step has the same rows and channels.
using Step = RowSumsStep<bfloat16, 64>;

int tiles_l_of(const RowSums& p) { return static_cast<int>((p.length + Step::kRows - 1) / Step::kRows); }

int channel_tiles_of(const RowSums& p) { return (p.channels + Step::kChannels - 1) / Step::kChannels; }

/// Columns of the middle that a block takes.
int columns_of(const RowSums& p) { return p.width <= 32 ? 32 : 64; }

}  // namespace

void lay_out_parts(RowSums& p) {
  // As many as give every multiprocessor two blocks.
  const int columns = columns_of(p);
  const int64_t blocks = static_cast<int64_t>(channel_tiles_of(p)) * ((p.width + columns - 1) / columns);
  const int64_t wanted = (2 * current_device().multiprocessors + blocks - 1) / blocks;
  p.splits = static_cast<int>(std::max<int64_t>(1, std::min(p.batch * tiles_l_of(p), wanted)));
  p.pitch = (p.width + 7) / 8 * 8;
  p.part_size = 2 * static_cast<int64_t>(p.channels) * p.pitch + p.pitch + 2 * p.channels;
}

void sum_over_rows(const RowSums& parameters, void* stream) {
  RowSums p = parameters;
  p.tiles_l = tiles_l_of(p);
  const int columns = columns_of(p);
  const dim3 grid(channel_tiles_of(p), (p.width + columns - 1) / columns, p.splits);
  const auto start = [&](auto width, auto type) {
    using S = RowSumsStep<decltype(type), width.value>;
    p.stages = 3;
    while (p.stages > 2 && S::shared_bytes(p.stages) > current_device().shared_memory) --p.stages;
    launch<row_sums_kernel<decltype(type), width.value>>(grid, S::kThreads, S::shared_bytes(p.stages), stream, p);
  };
  const auto with_type = [&](auto width) {
    return p.number == Number::kFloat16 ? start(width, float16{}) : start(width, bfloat16{});
  };
  columns == 32 ? with_type(std::integral_constant<int, 32>{}) : with_type(std::integral_constant<int, 64>{});
}

}  // namespace pyfused
