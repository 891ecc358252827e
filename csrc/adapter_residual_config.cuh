// Launch configurations of adapter_residual's passes over tiles of rows. None has been timed on a GPU yet.
#pragma once

#include <stdexcept>
#include <string>

#include "adapter_residual.h"
#include "bottleneck.cuh"
#include "launch.h"

namespace pyfused {

constexpr int kMaxStages = 4;

template <class B>
int stages_that_fit(int channels, const Device& device) {
  int stages = kMaxStages;
  while (stages > 1 && B::shared_bytes(channels, stages) > device.shared_memory) --stages;
  return stages > 1 ? stages : 0;
}

/// Of the tiles that fit on chip the one for which the busiest multiprocessor moves the fewest bytes: sets what it is
/// and calls `body` with its Bottleneck.
template <class T, int kNarrow, class Parameters, class Body>
void with_rows(Parameters p, const Body& body) {
  using Tall = Bottleneck<T, kNarrow, 4>;
  using Low = Bottleneck<T, kNarrow, 2>;
  const Device& device = current_device();
  const int tall = stages_that_fit<Tall>(p.channels, device), low = stages_that_fit<Low>(p.channels, device);
  if (low == 0) {
    throw std::runtime_error("adapter_residual: C = " + std::to_string(p.channels) + " with h = " +
                             std::to_string(p.width) + " does not fit into the GPU's shared memory of " +
                             std::to_string(device.shared_memory) + " bytes a block");
  }
  const auto bytes_moved = [&](int64_t rows) {
    const int64_t tiles = p.batch * ((p.length + rows - 1) / rows);
    const int64_t waves = (tiles + device.multiprocessors - 1) / device.multiprocessors;
    return waves * (6 * rows * p.channels + 4 * static_cast<int64_t>(p.channels) * p.width);
  };
  const auto start = [&](auto bottleneck, int stages) {
    using B = decltype(bottleneck);
    p.stages = stages;
    p.tiles_l = static_cast<int>((p.length + B::kRows - 1) / B::kRows);
    body(bottleneck, dim3(static_cast<unsigned>(p.batch * p.tiles_l)), p);
  };
  if (tall == 0 || bytes_moved(Low::kRows) < bytes_moved(Tall::kRows)) {
    start(Low{}, low);
  } else {
    start(Tall{}, tall);
  }
}

/// Calls `body` with the Bottleneck for the adapter's width and type, the grid and the completed parameters.
template <class Parameters, class Body>
void with_bottleneck(const Parameters& p, const Body& body) {
  const auto with_width = [&](auto type) {
    using T = decltype(type);
    if (p.width <= 64) return with_rows<T, 64>(p, body);
    if (p.width <= 128) return with_rows<T, 128>(p, body);
    if (p.width <= 256) return with_rows<T, 256>(p, body);
    throw std::runtime_error("adapter_residual: h must be at most 256, got " + std::to_string(p.width));
  };
  p.number == Number::kFloat16 ? with_width(float16{}) : with_width(bfloat16{});
}

}  // namespace pyfused
