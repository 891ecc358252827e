// The torch side of a mixed batch's low-rank terms on a CPU; pyfused/cpu/lora_linear.py has their schemas.
#include "low_rank.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels.h"
#include "operators.h"
#include "parallel.h"

namespace pyfused {
namespace {

/// The rows of every adapter, one adapter after the other; a row whose number is no adapter's is in none.
class Sorted {
 public:
  Sorted(const Tensor& adapter_index, int64_t adapters, int64_t length) : starts_(adapters + 1), length_(length) {
    const int64_t* index = const_data<int64_t>(adapter_index);
    const int64_t rows = adapter_index.numel(), stride = adapter_index.stride(0);
    std::vector<std::pair<int64_t, Span>> runs;
    for (int64_t row = 0; row < rows;) {
      const int64_t adapter = index[row * stride], end = std::min(rows, (row / length + 1) * length);
      int64_t next = row + 1;
      while (next < end && index[next * stride] == adapter) ++next;
      if (adapter >= 0 && adapter < adapters) runs.push_back({adapter, {row, 0, next - row}});
      row = next;
    }
    std::stable_sort(runs.begin(), runs.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (auto& [adapter, span] : runs) {
      span.at = count_;
      count_ += span.count;
      spans_.push_back(span);
      starts_[adapter + 1] = count_;
    }
    for (int64_t i = 0; i < adapters; ++i) starts_[i + 1] = std::max(starts_[i + 1], starts_[i]);
  }

  Mixed with_rank(int64_t rank) const {
    return {{spans_.data(), static_cast<int64_t>(spans_.size()), length_}, starts_.data(), rank};
  }
  int64_t count() const { return count_; }
  int64_t first(int64_t adapter) const { return starts_[adapter]; }
  int64_t adapters() const { return static_cast<int64_t>(starts_.size()) - 1; }

 private:
  std::vector<Span> spans_;
  std::vector<int64_t> starts_;
  int64_t length_, count_ = 0;
};

Rows turned(Rows matrix) {
  std::swap(matrix.stride_l, matrix.stride_c);
  return matrix;
}

/// A (G R, K) and its kind.
OfAdapters below_each_other(const Tensor& matrix, int64_t rank) {
  const Rows all = const_rows(matrix);
  return {all, rank * all.stride_l};
}
/// B (N, G R) and its kind.
OfAdapters side_by_side(const Tensor& matrix, int64_t rank) {
  const Rows all = const_rows(matrix);
  return {all, rank * all.stride_c};
}
OfAdapters turned(OfAdapters matrices) { return {turned(matrices.first), matrices.next}; }

struct Block {
  int64_t adapter, first, count;
};

void add(const Sorted& rows, const LowRankTerm& p, const Tensor& like) {
  const LowRankKernels& kernels = low_rank_kernels();
  std::vector<Block> blocks;
  for (int64_t adapter = 0; adapter < rows.adapters(); ++adapter) {
    for (int64_t first = rows.first(adapter); first < rows.first(adapter + 1); first += kMostRows) {
      blocks.push_back({adapter, first, std::min(kMostRows, rows.first(adapter + 1) - first)});
    }
  }
  if (blocks.empty()) return;
  const Tasks tasks(blocks.size(), rows.count() * p.rank * (p.inner + p.outer));
  const int64_t matrices = with_guard(tile_size(p.inner, p.rank)) + with_guard(tile_size(p.rank, p.outer));
  const int64_t scratch = with_guard(tile_size(kMostRows, p.rank)) + with_guard(tile_size(kMostRows, kMostColumns));
  const Tensor memory = empty({tasks.count * (matrices + scratch)}, Number::kFloat32, like);
  float* each = mutable_data<float>(memory);
  tasks.run([&](int64_t begin, int64_t end, int64_t task) {
    float* own = each + task * (matrices + scratch);
    for (int64_t i = begin; i < end; ++i) {
      const Block& block = blocks[i];
      if (i == begin || block.adapter != blocks[i - 1].adapter) kernels.load(p, block.adapter, own);
      kernels.add(p, block.adapter, block.first, block.count, own, own + matrices);
    }
  });
}

void sum(const Sorted& rows, const LowRankSum& p, const Tensor& like) {
  const LowRankKernels& kernels = low_rank_kernels();
  const int64_t panels = (p.columns + kSumsColumns - 1) / kSumsColumns;
  const Tasks tasks(rows.adapters() * panels, rows.count() * p.rank * p.columns);
  const int64_t scratch = with_guard(tile_size(kChunk, p.rank)) + with_guard(tile_size(kChunk, kSumsColumns)) +
                          with_guard(tile_size(p.rank, kSumsColumns)) + with_guard(kChunk * (p.rank + kMostPackedRows));
  const Tensor memory = empty({tasks.count * scratch}, Number::kFloat32, like);
  float* each = mutable_data<float>(memory);
  tasks.run([&](int64_t begin, int64_t end, int64_t task) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t column = unit % panels * kSumsColumns;
      kernels.sum(p, unit / panels, column, std::min(kSumsColumns, p.columns - column), each + task * scratch);
    }
  });
}

}  // namespace

void low_rank_fwd(const Tensor& y, const OptionalTensor& kept, const Tensor& x, const Tensor& lora_a,
                  const Tensor& lora_b, const Tensor& adapter_index, int64_t adapters, double scaling) {
  const int64_t rank = lora_a.size(0) / adapters;
  const Sorted rows(adapter_index, adapters, std::max<int64_t>(1, x.size(1)));
  LowRankTerm p{rows.with_rank(rank)};
  p.in = const_rows(x);
  p.out = mutable_rows(y);
  p.shrink = turned(below_each_other(lora_a, rank));
  p.expand = turned(side_by_side(lora_b, rank));
  if (kept) p.narrow = {by_rows(mutable_rows(*kept), x.size(1)), rank};
  p.inner = x.size(2);
  p.outer = y.size(2);
  p.before = 1.0f;
  p.after = static_cast<float>(scaling);
  add(rows, p, x);
}

void low_rank_bwd(const OptionalTensor& dx, const OptionalTensor& d_a, const OptionalTensor& d_b, const Tensor& dy,
                  const OptionalTensor& x, const Tensor& lora_a, const Tensor& lora_b, const OptionalTensor& kept,
                  const Tensor& adapter_index, int64_t adapters, double scaling) {
  const int64_t rank = lora_a.size(0) / adapters, length = dy.size(1);
  const Sorted rows(adapter_index, adapters, std::max<int64_t>(1, length));
  const Mixed mixed = rows.with_rank(rank);
  if (dx || d_a) {
    LowRankTerm p{mixed};
    p.in = const_rows(dy);
    if (dx) p.out = mutable_rows(*dx);
    p.shrink = side_by_side(lora_b, rank);
    p.expand = below_each_other(lora_a, rank);
    OptionalTensor q;
    if (d_a) {
      q = empty({adapter_index.numel(), rank}, Number::kFloat32, dy);
      p.narrow = {by_rows(mutable_rows(*q), length), 0};
    }
    p.inner = dy.size(2);
    p.outer = lora_a.size(1);
    p.before = static_cast<float>(scaling);
    p.after = 1.0f;
    add(rows, p, dy);
    if (d_a) {
      OfAdapters sums{mutable_rows(*d_a), 0};
      sums.next = rank * sums.first.stride_l;
      sum(rows, {mixed, p.narrow, sums, const_rows(x), lora_a.size(1), 1.0f}, dy);
    }
  }
  if (d_b) {
    OfAdapters sums{turned(mutable_rows(*d_b)), 0};
    sums.next = rank * sums.first.stride_l;
    const OfAdapters p{by_rows(const_rows(kept), length), rank};
    sum(rows, {mixed, p, sums, const_rows(dy), dy.size(2), static_cast<float>(scaling)}, dy);
  }
}

}  // namespace pyfused
