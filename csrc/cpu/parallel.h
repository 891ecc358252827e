// Work on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#ifdef PYFUSED_OWN_THREADS
#include <thread>
#include <vector>
#endif

namespace pyfused {

/// `units` of work in as many tasks as there are threads, or fewer where they would have too little to do.
struct Tasks {
  // Multiplications, or elements moved, that take as long as waking a thread.
  static constexpr int64_t kWorth = 1 << 17;
  int64_t units, count;

  /// `work`: multiplications of all units.
  Tasks(int64_t units, int64_t work) : units(units) {
    const int64_t most = std::min<int64_t>(units, torch::stable::get_num_threads());
    count = std::clamp<int64_t>(work / kWorth, 1, std::max<int64_t>(1, most));
  }

  /// Calls body(begin, end, task) for every task.
  template <class Body>
  void run(const Body& body) const {
    const auto some = [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        body(units * task / count, units * (task + 1) / count, task);
      }
    };
    if (count == 1) return some(0, 1);
#ifdef PYFUSED_OWN_THREADS
    // For a sanitizer that does not see torch's threads wait for each other.
    std::vector<std::thread> threads;
    for (int64_t task = 0; task < count; ++task) threads.emplace_back(some, task, task + 1);
    for (std::thread& thread : threads) thread.join();
#else
    torch::stable::parallel_for(0, count, 1, some);
#endif
  }
};

template <class Body>
void in_parallel(int64_t units, int64_t work, const Body& body) {
  Tasks(units, work).run(body);
}

}  // namespace pyfused
