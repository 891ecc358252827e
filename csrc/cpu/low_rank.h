// The low-rank terms of a mixed batch on a CPU: what their kernels are told; no torch header.
//
// Of the rows that adapter g has, with its A (R, K) and B (N, R):
//     forward      P = x A^T       y += s P B^T
//     backward     Q = s dy B      dx += Q A         dA = Q^T x         dB^T = s P^T dy
// A term makes P or Q and adds to y or dx; a sum is dA or dB^T. Each has its products in the order of the rows, on
// however many threads.
#pragma once

#include "rows.h"

namespace pyfused {

/// Rows by their adapters: the live rows from starts[g] to starts[g + 1] have adapter g.
struct Mixed {
  Live live;
  const int64_t* starts;
  int64_t rank;
};

/// A matrix of every adapter: `next` elements from one adapter's to the next one's.
struct OfAdapters {
  Rows first;
  int64_t next;
};

/// narrow = before in shrink; out += after narrow expand.
struct LowRankTerm : Mixed {
  Rows in, out;               // (B, L, inner), (B, L, outer); out's data null: narrow alone is wanted
  OfAdapters shrink, expand;  // (inner, R), (R, outer)
  OfAdapters narrow;          // (B, L, R); data null: not kept
  int64_t inner, outer;
  float before, after;
};

/// sum = factor narrow^T wide, over an adapter's rows.
struct LowRankSum : Mixed {
  OfAdapters narrow, sum;  // (B, L, R), (R, columns)
  Rows wide;               // (B, L, columns)
  int64_t columns;
  float factor;
};

/// Functions of one instruction set.
struct LowRankKernels {
  /// The matrices of an adapter, as `add` takes them.
  void (*load)(const LowRankTerm&, int64_t adapter, float* matrices);
  void (*add)(const LowRankTerm&, int64_t adapter, int64_t first, int64_t count, float* matrices, float* scratch);
  /// Up to kSumsColumns columns of a sum.
  void (*sum)(const LowRankSum&, int64_t adapter, int64_t column, int64_t columns, float* scratch);
};

}  // namespace pyfused
