// Launchers of cross_attention_residual: parameters of its kernels, and what starts them.
#pragma once

#include "types.h"

namespace pyfused {

/// A tensor (B or 1, H, T, C), or (B or 1, H, T) with a stride_c of 0; stride_l is T's, and what serves all images has
/// a stride_b of 0.
struct HeadRows {
  Rows rows;
  int64_t stride_h = 0;
};

/// What forward and backward read. The columns are J = H T; x and dy have the 16-bit type of e and f, or are float32.
struct CrossAttention {
  Rows x;
  HeadRows e, f, c;
  Vector bias, gate;  // without gate it is `weight`
  int64_t batch, length;
  int channels, heads, tokens, columns;
  int padded_tokens;   // the power of two from T on
  int inverse_tokens;  // 2^16 / T, rounded up: j inverse_tokens / 2^16 is the head of column j < 2^8
  float weight, eps;
  bool norm_match;
  Dropout dropout;
  Number number;  // of the products
  // What a launcher sets: tiles of rows in an image, slots of the pipeline.
  int tiles_l, stages;
};

/// p (M, J) is kept where it has data, with a minus sign where dropout takes it.
struct CrossAttentionForward : CrossAttention {
  Rows y, p;
};

/// p (M, J) is read, or made again and written with zeros up to `pitch`, the columns in whole eights. What else has
/// data is made: dx, ds / root (M, pitch), and without norm matching a (M, pitch) in `matched`. With norm matching,
/// where dF is wanted: rho and kappa / root of each row, of each tile of rows the largest of both and then kappa's sum,
/// and after them, by cross_attention_weigh, rho a and kappa a (M, pitch) in `matched` and `left`, a with 1 behind it if
/// there is a bias in `right`. `matched` is divided by the largest rho and `left` by the largest kappa, which 16 bits
/// may not hold and which `largest` gets.
struct CrossAttentionBackwardRows : CrossAttention {
  Rows dy, p, dx, ds, matched, left, right;
  float *rho, *kappa, *tile_numbers, *largest;  // (M), (M), (3, tiles), (2)
  float* gate_copy;  // gets `weight`, if there is no gate
  float root;        // of |weight|; with a gate that of the largest
  int pitch, tiles;  // tiles of rows in all
  bool recompute;
};

/// Contiguous gradients out of sums over rows, in `splits` parts for each context as sum_over_rows leaves them;
/// data null: not wanted.
struct CrossAttentionGradients : CrossAttention {
  const float* parts;
  int64_t part_size;
  int contexts, splits, pitch;
  // With norm matching: the sum of right^T left for each context, and of kappa, in `tiles` numbers each; the largest
  // rho and kappa, by which sums have been divided.
  const float *gram, *kappa_sums, *largest;
  int tiles;
  float root;
  bool wide_dy;
  // dc is the sum of `logit_count` numbers for each (context of c, column).
  Vector logit_parts;  // their stride is that from one number to the next
  int64_t logit_count, logit_groups;
  // Of bias and gate there is one for each context.
  Vector d_e, d_c, d_f, d_bias, d_gate;
};

/// to[i * count + j] = the sum over k of from[(i * parts + k) * part_size + j].
struct SumOfParts {
  const float* from;
  int64_t part_size, count;
  int parts, groups;
  Vector to;
};

void cross_attention_forward(const CrossAttentionForward& parameters, void* stream);
/// How many tiles of rows a pass has.
int cross_attention_tiles(const CrossAttention& parameters);
void cross_attention_backward_rows(const CrossAttentionBackwardRows& parameters, void* stream);
void cross_attention_weigh(const CrossAttentionBackwardRows& parameters, void* stream);
void cross_attention_gradients(const CrossAttentionGradients& parameters, void* stream);
void sum_parts(const SumOfParts& parameters, void* stream);

}  // namespace pyfused
