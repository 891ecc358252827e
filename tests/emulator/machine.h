// The emulator's inside: the scheduler of a block's threads.
#pragma once

#include <array>
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "memory.h"

namespace pyfused::emulator {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;

/// splitmix64.
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed) {}
  /// From 0 to `count` - 1, `count` below 2^32.
  uint32_t below(uint32_t count) {
    uint64_t z = state_ += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return static_cast<uint32_t>((z >> 32) * count >> 32);
  }

 private:
  uint64_t state_;
};

enum class State { kReady, kAtBarrier, kAtCollective, kEnded };

struct Thread {
  Fiber fiber;
  State state;
  Site site;  // where it waits
};

/// What the last lane to arrive does for all; `arguments` are the lanes', `first` the warp's first thread.
using Collective = void (*)(int first, void* const (&arguments)[kWarpSize], const Site& site);

struct Warp {
  uint32_t ready;  // a bit for each lane that can run
  int arrived;     // lanes at the collective
  int earliest;    // the thread that was there first
  void* arguments[kWarpSize];
};

class Machine {
 public:
  void run(const std::string& kernel, dim3 grid, int threads, int shared_bytes, void (*thread)(const void*),
           const void* argument);

  /// Of the running thread.
  int thread() const { return running_; }
  void barrier(const Site& site);
  void rendezvous(const Site& site, void* argument, Collective collective);

  /// "kernel: block (x, y, z), thread i: file:line: operation: what"
  [[noreturn]] void fail(int thread, const Site& site, const std::string& what) const;

  SharedMemory shared;
  GlobalMemory global;

 private:
  void run_block();
  void run_warp(int warp);
  void release_barrier();
  void suspend(State state, const Site& site);
  [[noreturn]] void fail_stuck() const;
  std::string block_name() const;
  static void enter_thread();

  const std::string* kernel_ = nullptr;
  void (*body_)(const void*) = nullptr;
  const void* argument_ = nullptr;
  int thread_count_ = 0;
  int running_ = 0;
  Random random_;
  std::exception_ptr error_;
  Fiber scheduler_;
  std::vector<Stack> stacks_;
  std::array<Thread, kMaxThreads> threads_;
  std::array<Warp, kMaxThreads / kWarpSize> warps_;
};

extern Machine machine;

std::string to_string(const Site& site);

}  // namespace pyfused::emulator
