// The kernels of a mixed batch's low-rank terms, compiled once for each instruction set: see simd.h.
#include "low_rank.h"

#include "products.h"
#include "simd.h"
#include "tiles.h"

namespace pyfused {
namespace {

Rows of(const OfAdapters& all, int64_t adapter) {
  Rows one = all.first;
  one.data = static_cast<char*>(one.data) + adapter * all.next * bytes_of(one.number);
  return one;
}

struct Matrices {
  Tile shrink, expand;
};
Matrices matrices_of(const LowRankTerm& p, float* memory) {
  Scratch scratch{memory};
  return {scratch.tile(p.inner, p.rank), scratch.tile(p.rank, p.outer)};
}

void load(const LowRankTerm& p, int64_t adapter, float* memory) {
  const Matrices to = matrices_of(p, memory);
  const Span inner{0, 0, p.inner}, rank{0, 0, p.rank};
  load_tile(of(p.shrink, adapter), whole(inner), 0, p.inner, 0, p.rank, to.shrink);
  if (p.out.data) load_tile(of(p.expand, adapter), whole(rank), 0, p.rank, 0, p.outer, to.expand);
}

/// out (rows, columns) = or += left times the matrix (depth, columns).
INLINE void multiply(int64_t rows, int64_t columns, int64_t depth, const Left& left, Tile matrix, Tile out, bool adds) {
  for (int64_t c = 0; c < columns; c += kPanel) {
    product(rows, least(kPanel, columns - c), depth, left, matrix.data + c, matrix.pitch, out.data + c, out.pitch, adds);
  }
}

void scale(Tile tile, int64_t rows, int64_t columns, float factor) {
  if (factor == 1.0f) return;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += kLanes) {
      float* there = tile.data + r * tile.pitch + c;
      store(there, load(there) * splat(factor));
    }
}

void add(const LowRankTerm& p, int64_t adapter, int64_t first, int64_t count, float* memory, float* own) {
  Scratch scratch{own};
  const Matrices matrices = matrices_of(p, memory);
  const Tile narrow = scratch.tile(kMostRows, p.rank), block = scratch.tile(kMostRows, kMostColumns);
  const Tile in = in_place(p.in, p.live, first, count), out = in_place(p.out, p.live, first, count);
  const bool reads = in.data && readable_in_place(p.in, false);
  for (int64_t column = 0; column < p.inner; column += kMostColumns) {
    const int64_t some = least(kMostColumns, p.inner - column);
    if (!reads) load_tile(p.in, p.live, first, count, column, some, block);
    const Tile x = reads ? from_column(in, column) : block;
    const Tile matrix{matrices.shrink.data + column * matrices.shrink.pitch, matrices.shrink.pitch};
    multiply(count, p.rank, some, rows_of(x.data, x.pitch), matrix, narrow, column > 0);
  }
  scale(narrow, count, p.rank, p.before);
  if (p.narrow.first.data) store_tile(of(p.narrow, adapter), p.live, first, count, 0, p.rank, narrow);
  if (!p.out.data) return;
  scale(narrow, count, p.rank, p.after);
  const Left left = rows_of(narrow.data, narrow.pitch);
  // Whole vectors of rows are added to where they lie.
  const int64_t wholes = out.data ? p.outer / kLanes * kLanes : 0;
  multiply(count, wholes, p.rank, left, matrices.expand, out, true);
  for (int64_t column = wholes; column < p.outer; column += kMostColumns) {
    const int64_t some = least(kMostColumns, p.outer - column);
    load_tile(p.out, p.live, first, count, column, some, block);
    multiply(count, some, p.rank, left, from_column(matrices.expand, column), block, true);
    store_tile(p.out, p.live, first, count, column, some, block);
  }
}

void sum(const LowRankSum& p, int64_t adapter, int64_t column, int64_t columns, float* memory) {
  Scratch scratch{memory};
  const Tile narrow = scratch.tile(kChunk, p.rank), block = scratch.tile(kChunk, kSumsColumns);
  const Tile total = scratch.tile(p.rank, kSumsColumns);
  float* packed = scratch.take(packed_size(kChunk, p.rank));
  const int64_t first = p.starts[adapter], last = p.starts[adapter + 1];
  if (first == last) std::memset(total.data, 0, p.rank * total.pitch * sizeof(float));
  for (int64_t start = first; start < last; start += kChunk) {
    const int64_t count = least(kChunk, last - start);
    load_tile(of(p.narrow, adapter), p.live, start, count, 0, p.rank, narrow);
    load_tile(p.wide, p.live, start, count, column, columns, block);
    const Left left = pack_transposed(narrow.data, narrow.pitch, count, p.rank, packed);
    multiply(p.rank, columns, count, left, block, total, start > first);
  }
  scale(total, p.rank, columns, p.factor);
  const Span rank{0, 0, p.rank};
  store_tile(of(p.sum, adapter), whole(rank), 0, p.rank, column, columns, total);
}

}  // namespace

namespace PYFUSED_KERNELS {
extern const LowRankKernels low_rank;
const LowRankKernels low_rank = {load, add, sum};
}  // namespace PYFUSED_KERNELS

}  // namespace pyfused
