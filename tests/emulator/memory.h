// The emulator's memory: which accesses are allowed, which of them race, and copies under way.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "emulator.h"

namespace pyfused::emulator {

/// Sites as small numbers.
class Sites {
 public:
  uint16_t index(const Site& site);
  const Site& operator[](uint16_t index) const { return sites_[index]; }

 private:
  std::array<Site, 1 << 16> sites_ = {};
};

/// A block's shared memory. Two accesses by different threads, one of them a write, race unless a barrier lies between
/// or, within a warp, a __syncwarp: CUDA promises no order of memory for anything else that a warp does together. Both
/// stamp what follows them with a later time.
class SharedMemory {
 public:
  SharedMemory();

  void start_launch(int bytes);
  /// Every byte is 0xFF: NaN in bfloat16, float16 and float32.
  void start_block();
  char* at() const { return memory_; }

  void check(int thread, const void* at, int bytes, bool write, const Site& site);
  void pass_barrier();
  void pass_syncwarp(int warp) { warp_time_[warp] = ++clock_; }

  /// Poisons the 16 bytes; the copy itself is made when the thread has waited for it. Between, they are untouchable.
  void issue(int thread, void* to, const void* from, int bytes, const Site& site);
  void commit(int thread);
  void wait(int thread, int pending);
  /// The copies that a thread did not wait for.
  void finish(int thread);

 private:
  struct Access {
    uint32_t time = 0;
    uint16_t site = 0;
    uint16_t thread : 10;
    uint16_t several_lanes : 1;  // of reads: at this time, by more lanes than the last
    uint16_t several_warps : 1;  // of reads: since the last barrier, by more warps than the last
    uint16_t under_way : 1;      // of writes: a copy not yet waited for
    Access() : thread(0), several_lanes(0), several_warps(0), under_way(0) {}
  };
  /// What is remembered of two bytes: the last write and the reads since the last barrier.
  struct Unit {
    Access write, read;
  };
  struct Copy {
    char* to;
    const void* from;
    int bytes;
    Site site;
  };
  struct Copies {
    std::vector<Copy> issued;
    std::vector<size_t> group_ends;
  };

  Unit* units(const void* at) const { return units_.get() + (static_cast<const char*>(at) - memory_) / 2; }
  bool is_before(const Access& access, int thread) const;
  void check_place(int thread, const void* at, int bytes, const Site& site) const;
  void note_read(Unit& unit, const Access& now, const Site& site) const;
  void note_write(Unit& unit, const Access& now, const Site& site) const;
  [[noreturn]] void fail_race(const Access& before, const char* what, const Access& now, const Site& site) const;
  void complete(int thread, size_t count);

  Sites sites_;
  std::unique_ptr<char[]> allocation_;
  char* memory_;
  std::unique_ptr<Unit[]> units_;
  int bytes_ = 0;
  uint32_t clock_ = 0;
  uint32_t block_time_ = 0;
  std::array<uint32_t, 32> warp_time_ = {};
  std::array<Copies, 1024> copies_;
};

class GlobalMemory {
 public:
  void expose(const void* at, size_t bytes, bool writable);
  void clear() { buffers_.clear(); }
  void check(int thread, const void* at, int bytes, int alignment, bool write, const Site& site) const;

 private:
  struct Buffer {
    uintptr_t begin, end;
    bool writable;
  };
  [[noreturn]] void fail(int thread, uintptr_t begin, uintptr_t end, bool write, const Site& site) const;

  std::vector<Buffer> buffers_;
};

}  // namespace pyfused::emulator
