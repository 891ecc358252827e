// Launch configurations of cross_attention_residual's passes over tiles of rows. None has been timed on a GPU yet.
#pragma once

#include <stdexcept>
#include <string>

#include "cross_attention_residual.cuh"
#include "launch.h"

namespace pyfused {

template <class T, int kNarrow, int kRowWarps>
using AttentionTile = Bottleneck<T, kNarrow, kRowWarps, true>;

/// Slots of the pipeline that fit beside a tile of rows: 2 to 4, or 0.
template <class B>
int attention_stages(const CrossAttention& p) {
  int stages = 4;
  while (stages > 1 && B::shared_bytes(p.channels, stages) > current_device().shared_memory) --stages;
  return stages > 1 ? stages : 0;
}

/// Bytes that the busiest multiprocessor moves with tiles of so many rows.
template <class B>
int64_t attention_bytes(const CrossAttention& p) {
  const int64_t tiles = p.batch * ((p.length + B::kRows - 1) / B::kRows);
  const int64_t multiprocessors = current_device().multiprocessors;
  const int64_t waves = (tiles + multiprocessors - 1) / multiprocessors;
  return waves * p.channels * (6 * B::kRows + 4 * static_cast<int64_t>(p.columns));
}

/// Calls `body` with a Bottleneck of kNarrow columns: of those that fit, the one that moves the fewest bytes, and 16
/// rows where no more do.
template <class T, int kNarrow, class Body>
void with_attention_rows(const CrossAttention& p, const Body& body) {
  using Low = AttentionTile<T, kNarrow, 2>;
  using Lowest = AttentionTile<T, kNarrow, 1>;
  if constexpr (kNarrow <= 128) {
    using Tall = AttentionTile<T, kNarrow, 4>;
    const int stages = attention_stages<Tall>(p);
    if (stages != 0 && attention_bytes<Tall>(p) <= attention_bytes<Low>(p)) return body(Tall{}, stages);
  }
  if (const int stages = attention_stages<Low>(p)) return body(Low{}, stages);
  if (const int stages = attention_stages<Lowest>(p)) return body(Lowest{}, stages);
  throw std::runtime_error("cross_attention_residual: C = " + std::to_string(p.channels) + " with H T = " +
                           std::to_string(p.columns) + " does not fit into the GPU's shared memory of " +
                           std::to_string(current_device().shared_memory) + " bytes a block");
}

/// Calls `body` with the Bottleneck for the columns and the type, and the slots of its pipeline.
template <class Body>
void with_attention_tile(const CrossAttention& p, const Body& body) {
  const auto with_type = [&](auto type) {
    using T = decltype(type);
    if (p.columns <= 64) return with_attention_rows<T, 64>(p, body);
    if (p.columns <= 128) return with_attention_rows<T, 128>(p, body);
    if (p.columns <= kMostColumns && !p.norm_match) return with_attention_rows<T, kMostColumns>(p, body);
    const int most = p.norm_match ? kMostMatched : kMostColumns;
    throw std::runtime_error("cross_attention_residual: H T must be at most " + std::to_string(most) + ", got " +
                             std::to_string(p.columns));
  };
  p.number == Number::kFloat16 ? with_type(float16{}) : with_type(bfloat16{});
}

/// Starts a pass over tiles of rows.
template <class Parameters, class Start>
void over_tiles(Parameters p, const Start& start) {
  with_attention_tile(p, [&](auto tile, int stages) {
    using B = decltype(tile);
    p.stages = stages;
    p.tiles_l = static_cast<int>((p.length + B::kRows - 1) / B::kRows);
    start(tile, dim3(static_cast<unsigned>(p.batch * p.tiles_l)), B::shared_bytes(p.channels, stages), p);
  });
}

}  // namespace pyfused
