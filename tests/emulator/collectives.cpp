// What a warp does together.
#include "machine.h"

namespace pyfused::emulator {

namespace {

void check_mask(uint32_t mask, const Site& site) {
  if (mask != ~0u) machine.fail(machine.thread(), site, "mask: all 32 lanes, got " + std::to_string(mask));
}

struct Shuffle {
  uint64_t bits;
  int from;
  uint64_t result;
};

struct Ldmatrix {
  uint32_t* to;
  const char* row;
};

struct Mma {
  float* sum;
  const uint32_t* a;
  uint32_t b[2];
  float (*to_float)(uint16_t);
};

uint16_t element(const char* row, int column) {
  uint16_t bits;
  std::memcpy(&bits, row + 2 * column, sizeof(bits));
  return bits;
}

// Lane i gets, of each matrix, elements 2 (i % 4) and the next of row i / 4; transposed, of column i / 4.
template <bool kTransposed>
void load_matrices(int first, void* const (&arguments)[kWarpSize], const Site& site) {
  const auto lane = [&arguments](int i) { return static_cast<const Ldmatrix*>(arguments[i]); };
  for (int i = 0; i < kWarpSize; ++i) machine.shared.check(first + i, lane(i)->row, 16, false, site);
  for (int i = 0; i < kWarpSize; ++i) {
    const int row = i / 4;
    const int column = 2 * (i % 4);
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto at = [&](int row, int column) { return element(lane(8 * matrix + row)->row, column); };
      const uint32_t low = kTransposed ? at(column, row) : at(row, column);
      const uint32_t high = kTransposed ? at(column + 1, row) : at(row, column + 1);
      lane(i)->to[matrix] = high << 16 | low;
    }
  }
}

// The fragments are those of the PTX manual, "Matrix Fragments for mma.m16n8k16 with floating point type".
void multiply(int, void* const (&arguments)[kWarpSize], const Site&) {
  float a[16][16], b[16][8], products[16][8] = {};
  for (int i = 0; i < kWarpSize; ++i) {
    const Mma& lane = *static_cast<const Mma*>(arguments[i]);
    const int group = i / 4;
    const int pair = 2 * (i % 4);
    for (int half = 0; half < 2; ++half) {
      const auto number = [&lane, half](uint32_t both) { return lane.to_float(both >> 16 * half & 0xFFFF); };
      for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][pair + half + r / 2 * 8] = number(lane.a[r]);
      for (int r = 0; r < 2; ++r) b[pair + half + r * 8][group] = number(lane.b[r]);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) products[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int i = 0; i < kWarpSize; ++i) {
    const Mma& lane = *static_cast<const Mma*>(arguments[i]);
    for (int r = 0; r < 4; ++r) lane.sum[r] += products[i / 4 + r / 2 * 8][2 * (i % 4) + r % 2];
  }
}

}  // namespace

void barrier(const Site& site) { machine.barrier(site); }

void sync_warp(uint32_t mask, const Site& site) {
  check_mask(mask, site);
  machine.rendezvous(site, nullptr, [](int first, void* const (&)[kWarpSize], const Site&) {
    machine.shared.pass_syncwarp(first / kWarpSize);
  });
}

uint64_t shuffle(uint32_t mask, uint64_t bits, int from, const Site& site) {
  check_mask(mask, site);
  if (from < 0 || from >= kWarpSize) {
    machine.fail(machine.thread(), site, "lane: 0 to 31, got " + std::to_string(from));
  }
  Shuffle mine = {bits, from, 0};
  machine.rendezvous(site, &mine, [](int, void* const (&arguments)[kWarpSize], const Site&) {
    for (void* argument : arguments) {
      auto* lane = static_cast<Shuffle*>(argument);
      lane->result = static_cast<const Shuffle*>(arguments[lane->from])->bits;
    }
  });
  return mine.result;
}

void ldmatrix(uint32_t (&to)[4], const void* row, bool transposed, const Site& site) {
  Ldmatrix mine = {to, static_cast<const char*>(row)};
  machine.rendezvous(site, &mine, transposed ? load_matrices<true> : load_matrices<false>);
}

void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*to_float)(uint16_t),
         const Site& site) {
  Mma mine = {sum, a, {b0, b1}, to_float};
  machine.rendezvous(site, &mine, multiply);
}

}  // namespace pyfused::emulator
