#include "memory.h"

#include <algorithm>

#include "machine.h"

namespace pyfused::emulator {

namespace {

// The most that any GPU gives a block, and more.
constexpr int kMaxShared = 256 * 1024;
constexpr int kSharedAlignment = 128;
constexpr int kCopyBytes = 16;

std::string number(size_t count, const char* noun) {
  return std::to_string(count) + " " + noun + (count == 1 ? "" : "s");
}

void check_alignment(int thread, const void* at, int alignment, const Site& site) {
  const auto excess = reinterpret_cast<uintptr_t>(at) % alignment;
  if (excess == 0) return;
  machine.fail(
      thread, site,
      "misaligned: the address is " + number(excess, "byte") + " past a multiple of " + std::to_string(alignment));
}

}  // namespace

uint16_t Sites::index(const Site& site) {
  auto slot = static_cast<uint16_t>(reinterpret_cast<uintptr_t>(site.source.file) + site.source.line * 31 +
                                    reinterpret_cast<uintptr_t>(site.operation));
  // No program has as many sites as there are slots.
  while (sites_[slot].operation != nullptr && sites_[slot] != site) ++slot;
  sites_[slot] = site;
  return slot;
}

SharedMemory::SharedMemory() : allocation_(new char[kMaxShared + kSharedAlignment]), units_(new Unit[kMaxShared / 2]) {
  const auto start = reinterpret_cast<uintptr_t>(allocation_.get());
  memory_ = allocation_.get() + (kSharedAlignment - start % kSharedAlignment);
}

void SharedMemory::start_launch(int bytes) {
  bytes_ = bytes;
  clock_ = 0;
  // A launch that failed leaves copies under way.
  std::fill_n(units_.get(), (bytes + 1) / 2, Unit());
  for (Copies& copies : copies_) {
    copies.issued.clear();
    copies.group_ends.clear();
  }
}

void SharedMemory::start_block() {
  std::memset(memory_, 0xFF, bytes_);
  pass_barrier();
}

void SharedMemory::pass_barrier() {
  block_time_ = ++clock_;
  warp_time_.fill(clock_);
}

bool SharedMemory::is_before(const Access& access, int thread) const {
  return access.time < block_time_ || access.thread == thread ||
         (access.thread / kWarpSize == thread / kWarpSize && access.time < warp_time_[thread / kWarpSize]);
}

void SharedMemory::check_place(int thread, const void* at, int bytes, const Site& site) const {
  check_alignment(thread, at, bytes, site);
  const auto offset =
      static_cast<std::ptrdiff_t>(reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(memory_));
  if (offset >= 0 && offset + bytes <= bytes_) return;
  machine.fail(thread, site,
               "out of bounds: bytes " + std::to_string(offset) + " to " + std::to_string(offset + bytes - 1) + " of " +
                   number(bytes_, "byte") + " of shared memory");
}

void SharedMemory::check(int thread, const void* at, int bytes, bool write, const Site& site) {
  check_place(thread, at, bytes, site);
  Access now;
  now.time = warp_time_[thread / kWarpSize];
  now.site = sites_.index(site);
  now.thread = thread;
  Unit* unit = units(at);
  for (int i = 0; i < bytes / 2; ++i) write ? note_write(unit[i], now, site) : note_read(unit[i], now, site);
}

void SharedMemory::note_read(Unit& unit, const Access& now, const Site& site) const {
  if (unit.write.under_way) fail_race(unit.write, "is still being copied", now, site);
  if (!is_before(unit.write, now.thread)) fail_race(unit.write, "was written", now, site);
  Access& last = unit.read;
  const Access before = last;
  last = now;
  if (before.time < block_time_) return;
  last.several_warps = before.several_warps || before.thread / kWarpSize != now.thread / kWarpSize;
  last.several_lanes = before.time == now.time && (before.several_lanes || before.thread != now.thread);
}

void SharedMemory::note_write(Unit& unit, const Access& now, const Site& site) const {
  if (unit.write.under_way) fail_race(unit.write, "is still being copied", now, site);
  if (!is_before(unit.write, now.thread)) fail_race(unit.write, "was written", now, site);
  const Access& read = unit.read;
  if (read.time >= block_time_) {
    if (read.several_warps) fail_race(read, "was read by several warps, last", now, site);
    if (read.several_lanes && read.time == now.time) fail_race(read, "was read by several lanes, last", now, site);
    if (!is_before(read, now.thread)) fail_race(read, "was read", now, site);
  }
  unit.write = now;
}

void SharedMemory::fail_race(const Access& before, const char* what, const Access& now, const Site& site) const {
  machine.fail(now.thread, site,
               std::string("race: what it touches ") + what + " by thread " + std::to_string(before.thread) + " in " +
                   to_string(sites_[before.site]) + ", and nothing orders the two");
}

void SharedMemory::issue(int thread, void* to, const void* from, int bytes, const Site& site) {
  if (bytes < 0 || bytes > kCopyBytes) machine.fail(thread, site, "bytes: 0 to 16, got " + std::to_string(bytes));
  check_alignment(thread, from, kCopyBytes, site);
  if (bytes > 0) machine.global.check(thread, from, bytes, 1, false, site);
  check(thread, to, kCopyBytes, true, site);
  for (int i = 0; i < kCopyBytes / 2; ++i) units(to)[i].write.under_way = 1;
  std::memset(to, 0xFF, kCopyBytes);
  copies_[thread].issued.push_back({static_cast<char*>(to), from, bytes, site});
}

void SharedMemory::commit(int thread) { copies_[thread].group_ends.push_back(copies_[thread].issued.size()); }

void SharedMemory::wait(int thread, int pending) {
  std::vector<size_t>& ends = copies_[thread].group_ends;
  const int groups = static_cast<int>(ends.size()) - pending;
  if (groups <= 0) return;
  const size_t count = ends[groups - 1];
  complete(thread, count);
  ends.erase(ends.begin(), ends.begin() + groups);
  for (size_t& end : ends) end -= count;
}

void SharedMemory::finish(int thread) {
  complete(thread, copies_[thread].issued.size());
  copies_[thread].group_ends.clear();
}

void SharedMemory::complete(int thread, size_t count) {
  std::vector<Copy>& copies = copies_[thread].issued;
  for (size_t i = 0; i < count; ++i) {
    const Copy& copy = copies[i];
    std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(copy.to + copy.bytes, 0, kCopyBytes - copy.bytes);
    for (int unit = 0; unit < kCopyBytes / 2; ++unit) {
      Access& write = units(copy.to)[unit].write;
      write.under_way = 0;
      write.time = warp_time_[thread / kWarpSize];
    }
  }
  copies.erase(copies.begin(), copies.begin() + count);
}

void GlobalMemory::expose(const void* at, size_t bytes, bool writable) {
  const auto begin = reinterpret_cast<uintptr_t>(at);
  buffers_.push_back({begin, begin + bytes, writable});
}

void GlobalMemory::check(int thread, const void* at, int bytes, int alignment, bool write, const Site& site) const {
  check_alignment(thread, at, alignment, site);
  const auto begin = reinterpret_cast<uintptr_t>(at);
  for (const Buffer& buffer : buffers_) {
    if (begin >= buffer.begin && begin + bytes <= buffer.end && (buffer.writable || !write)) return;
  }
  fail(thread, begin, begin + bytes, write, site);
}

void GlobalMemory::fail(int thread, uintptr_t begin, uintptr_t end, bool write, const Site& site) const {
  const auto outside = [&](const Buffer& buffer) {
    return std::max(buffer.begin > begin ? buffer.begin - begin : 0, end > buffer.end ? end - buffer.end : 0);
  };
  const std::string what = std::string(write ? "writes " : "reads ") + number(end - begin, "byte");
  if (buffers_.empty()) machine.fail(thread, site, "out of bounds: " + what + ", and no buffer is exposed");
  const auto nearest = std::min_element(buffers_.begin(), buffers_.end(),
                                        [&](const Buffer& a, const Buffer& b) { return outside(a) < outside(b); });
  const std::string name = "buffer " + std::to_string(nearest - buffers_.begin()) + " (" +
                           number(nearest->end - nearest->begin, "byte") +
                           (nearest->writable ? ", writable)" : ", read-only)");
  if (outside(*nearest) == 0) machine.fail(thread, site, "read-only: " + what + " inside " + name);
  const bool past = end > nearest->end;
  machine.fail(thread, site,
               "out of bounds: " + what + (past ? " that end " : " that begin ") + number(outside(*nearest), "byte") +
                   (past ? " past the end of " : " before ") + name + ", the nearest");
}

// ---- What kernels call

char* shared_buffer() { return machine.shared.at(); }
void check_shared(const void* at, int bytes, bool write, const Site& site) {
  machine.shared.check(machine.thread(), at, bytes, write, site);
}
void check_global(const void* at, int bytes, bool write, const Site& site) {
  machine.global.check(machine.thread(), at, bytes, bytes, write, site);
}
void copy(void* shared, const void* global, int bytes, const Site& site) {
  machine.shared.issue(machine.thread(), shared, global, bytes, site);
}
void commit_copies() { machine.shared.commit(machine.thread()); }
void wait_for_copies(int pending) { machine.shared.wait(machine.thread(), pending); }

// ---- What launchers call

void expose(const void* at, size_t bytes, bool writable) { machine.global.expose(at, bytes, writable); }
void clear() { machine.global.clear(); }

}  // namespace pyfused::emulator
