#include "emulator.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "launch.h"
#include "machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace pyfused {

namespace {

/// The device to play, and the schedule.
struct Settings {
  Device device = {90, 4, 232448};
  uint64_t seed = 0;
};
Settings settings;

}  // namespace

const Device& current_device() { return settings.device; }

namespace emulator {

void emulate(const Device& device, uint64_t seed) { settings = {device, seed}; }

Machine machine;

std::string to_string(const Site& site) {
  return std::string(site.operation) + " (" + site.source.file + ":" + std::to_string(site.source.line) + ")";
}

namespace {

std::string to_string(const dim3& size) {
  return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " + std::to_string(size.z) + ")";
}

void check_launch(const std::string& kernel, dim3 grid, int threads, int shared_bytes) {
  const auto refuse = [&kernel](const std::string& what) { throw std::runtime_error(kernel + ": " + what); };
  if (grid.x < 1 || grid.x > 0x7FFFFFFF || grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535) {
    refuse("grid: (1, 1, 1) to (2147483647, 65535, 65535), got " + to_string(grid));
  }
  if (threads < 1 || threads > kMaxThreads || threads % kWarpSize != 0) {
    refuse("threads: a multiple of 32 up to 1024, got " + std::to_string(threads));
  }
  const int limit = current_device().shared_memory;
  if (shared_bytes < 0 || shared_bytes > limit) {
    refuse("shared_bytes: 0 to the device's " + std::to_string(limit) + ", got " + std::to_string(shared_bytes));
  }
}

/// "0-31, 40" for the sorted `threads`.
std::string ranges(const std::vector<int>& threads) {
  std::string text;
  for (size_t i = 0, end = 0; i < threads.size(); i = end) {
    for (end = i + 1; end < threads.size() && threads[end] == threads[end - 1] + 1;) ++end;
    text += (i == 0 ? "" : ", ") + std::to_string(threads[i]);
    if (end > i + 1) text += "-" + std::to_string(threads[end - 1]);
  }
  return text;
}

}  // namespace

void run(const std::string& kernel, dim3 grid, int threads, int shared_bytes, void (*thread)(const void*),
         const void* argument) {
  check_launch(kernel, grid, threads, shared_bytes);
  machine.run(kernel, grid, threads, shared_bytes, thread, argument);
}

void Machine::run(const std::string& kernel, dim3 grid, int threads, int shared_bytes, void (*thread)(const void*),
                  const void* argument) {
  kernel_ = &kernel;
  body_ = thread;
  argument_ = argument;
  thread_count_ = threads;
  random_ = Random(settings.seed);
  stacks_.resize(std::max<size_t>(stacks_.size(), threads));
  shared.start_launch(shared_bytes);
  gridDim = grid;
  blockDim = dim3(threads);
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  for (size_t left = blocks.size(); left > 0; --left) {
    std::swap(blocks[random_.below(left)], blocks[left - 1]);
    const uint64_t block = blocks[left - 1];
    blockIdx = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                static_cast<unsigned>(block / grid.x / grid.y)};
    run_block();
  }
}

void Machine::run_block() {
  shared.start_block();
  for (int i = 0; i < thread_count_; ++i) {
    threads_[i].state = State::kReady;
    // Frames at the same place of every stack would share a few lines of the cache.
    prepare(threads_[i].fiber, stacks_[i], i % kWarpSize * 320, enter_thread);
  }
  const int warps = thread_count_ / kWarpSize;
  for (int i = 0; i < warps; ++i) warps_[i] = {~0u, 0, 0, {}};
  while (true) {
    int with_ready[kMaxThreads / kWarpSize];
    int count = 0;
    for (int i = 0; i < warps; ++i) {
      if (warps_[i].ready != 0) with_ready[count++] = i;
    }
    if (count > 0) {
      run_warp(with_ready[random_.below(count)]);
      continue;
    }
    const auto ended = [](const Thread& thread) { return thread.state == State::kEnded; };
    if (std::all_of(threads_.begin(), threads_.begin() + thread_count_, ended)) return;
    release_barrier();
  }
}

// As far as it can go, while the other warps lag behind.
void Machine::run_warp(int index) {
  Warp& warp = warps_[index];
  while (warp.ready != 0) {
    const uint32_t start = random_.below(kWarpSize);
    const uint32_t rotated = warp.ready >> start | warp.ready << (-start & 31);
    const int lane = (__builtin_ctz(rotated) + start) % kWarpSize;
    warp.ready &= ~(1u << lane);
    running_ = index * kWarpSize + lane;
    threadIdx = {static_cast<unsigned>(running_), 0, 0};
    switch_fibers(scheduler_, threads_[running_].fiber);
    // The other threads are left where they are: the next launch starts them anew.
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

void Machine::enter_thread() {
  const int thread = machine.running_;
  try {
    machine.body_(machine.argument_);
    machine.shared.finish(thread);
  } catch (...) {
    machine.error_ = std::current_exception();
  }
  machine.suspend(State::kEnded, {});
}

void Machine::suspend(State state, const Site& site) {
  Thread& thread = threads_[running_];
  thread.state = state;
  thread.site = site;
  switch_fibers(thread.fiber, scheduler_);
}

void Machine::barrier(const Site& site) { suspend(State::kAtBarrier, site); }

// When nothing can run: all wait at the same barrier, or for good.
void Machine::release_barrier() {
  for (int i = 0; i < thread_count_; ++i) {
    const Thread& thread = threads_[i];
    if (thread.state != State::kAtBarrier || thread.site != threads_[0].site) fail_stuck();
  }
  shared.pass_barrier();
  for (int i = 0; i < thread_count_ / kWarpSize; ++i) warps_[i].ready = ~0u;
}

void Machine::rendezvous(const Site& site, void* argument, Collective collective) {
  const int thread = running_;
  const int first = thread / kWarpSize * kWarpSize;
  Warp& warp = warps_[thread / kWarpSize];
  if (warp.arrived == 0) {
    warp.earliest = thread;
  } else if (const Site& there = threads_[warp.earliest].site; there != site) {
    fail(thread, site,
         "divergence: thread " + std::to_string(warp.earliest) + " of the warp is in " + to_string(there));
  }
  warp.arguments[thread - first] = argument;
  if (++warp.arrived < kWarpSize) {
    suspend(State::kAtCollective, site);
    return;
  }
  collective(first, warp.arguments, site);
  warp.arrived = 0;
  warp.ready = ~(1u << (thread - first));
}

void Machine::fail(int thread, const Site& site, const std::string& what) const {
  throw std::runtime_error(*kernel_ + ": " + block_name() + ", thread " + std::to_string(thread) + ": " +
                           site.source.file + ":" + std::to_string(site.source.line) + ": " + site.operation + ": " +
                           what);
}

std::string Machine::block_name() const { return "block " + to_string(dim3(blockIdx.x, blockIdx.y, blockIdx.z)); }

void Machine::fail_stuck() const {
  std::map<std::string, std::vector<int>> places;
  for (int i = 0; i < thread_count_; ++i) {
    const Thread& thread = threads_[i];
    const bool ended = thread.state == State::kEnded;
    places[ended ? "ended" : "wait at " + emulator::to_string(thread.site)].push_back(i);
  }
  std::string text;
  for (const auto& [place, threads] : places) text += (text.empty() ? "" : "; ") + ranges(threads) + " " + place;
  throw std::runtime_error(*kernel_ + ": " + block_name() + ": deadlock: threads " + text);
}

}  // namespace emulator

}  // namespace pyfused
