// The torch side of cross_attention_residual; pyfused/ops/cross_attention_residual.py has the contract.
#include "cross_attention_residual.h"

#include <cmath>
#include <stdexcept>
#include <string>

#include "call.h"
#include "operators.h"
#include "row_sums.h"

namespace pyfused {
namespace {

Tensor nothing(const Tensor& like) { return empty({0}, number_of(like), like); }

/// x or dy: as it is in the type of the products, else in float32.
Tensor rows_of(const Tensor& rows, const Tensor& like) {
  using torch::headeronly::ScalarType;
  if (rows.scalar_type() == like.scalar_type() || rows.scalar_type() == ScalarType::Float) return rows;
  return torch::stable::to(rows, ScalarType::Float);
}

/// E, F or c.
HeadRows head_rows(const Tensor& tensor) {
  HeadRows heads;
  heads.rows.data = const_cast<void*>(const_data<void>(tensor));
  heads.rows.number = number_of(tensor);
  heads.rows.stride_b = tensor.size(0) == 1 ? 0 : tensor.stride(0);
  heads.stride_h = tensor.stride(1);
  heads.rows.stride_l = tensor.stride(2);
  if (tensor.dim() == 4) {
    heads.rows.stride_c = tensor.stride(3);
    heads.rows = with_access(heads.rows);
    // Unlike rows, what is read 16 bytes at a time has a third stride here.
    const bool whole = heads.stride_h % 8 == 0 && heads.rows.access == Access::kChannels;
    heads.rows.access = whole ? Access::kChannels : Access::kElements;
  }
  return heads;
}

/// What both directions read, for rows (batch, length).
CrossAttention attention_of(int64_t batch, int64_t length, const Tensor& e, const OptionalTensor& c, const Tensor& f,
                            const OptionalTensor& bias, const OptionalTensor& gate, const OptionalTensor& seed,
                            double weight, bool norm_match, double eps, double dropout_p) {
  if (batch * length > INT32_MAX) {
    throw std::runtime_error("cross_attention_residual: backend 'cuda' takes fewer than 2^31 rows, got " +
                             std::to_string(batch * length));
  }
  if (number_of(e) == Number::kFloat32 || f.scalar_type() != e.scalar_type()) {
    throw std::runtime_error("cross_attention_residual: e and f must have one dtype, float16 or bfloat16, on backend "
                             "'cuda'");
  }
  CrossAttention p{};
  p.e = head_rows(e);
  p.f = head_rows(f);
  if (c) p.c = head_rows(*c);
  p.bias = const_vector(bias);
  p.gate = const_vector(gate);
  p.batch = batch;
  p.length = length;
  p.channels = static_cast<int>(e.size(3));
  p.heads = static_cast<int>(e.size(1));
  p.tokens = static_cast<int>(e.size(2));
  p.columns = p.heads * p.tokens;
  p.padded_tokens = 1;
  while (p.padded_tokens < p.tokens) p.padded_tokens *= 2;
  p.inverse_tokens = (1 << 16) / p.tokens + 1;
  p.weight = static_cast<float>(weight);
  p.eps = static_cast<float>(eps);
  p.norm_match = norm_match;
  p.dropout = dropout(seed, dropout_p);
  p.number = number_of(e);
  return p;
}

/// Sums over rows in parts that belong to one context each, of matrices as wide as p's columns times `sums.z`, whose
/// width is `channels`, and dy. Returns the parts.
Tensor sum_rows(RowSums& sums, const CrossAttention& p, int64_t channels, int64_t contexts,
                const Tensor& like, const Call& call) {
  sums.batch = p.batch;
  sums.length = p.length;
  sums.channels = static_cast<int>(channels);
  sums.width = p.columns;
  sums.number = p.number;
  sums.per_sample = 1;
  lay_out_parts(sums);
  const int64_t splits = (sums.splits + contexts - 1) / contexts * contexts;
  if (splits > UINT16_MAX) {
    throw std::runtime_error("cross_attention_residual: backward on backend 'cuda' takes at most 65535 contexts, got " +
                             std::to_string(contexts));
  }
  sums.splits = static_cast<int>(splits);
  Tensor parts = empty({splits, sums.part_size}, Number::kFloat32, like);
  sums.parts = mutable_data<float>(parts);
  sum_over_rows(sums, call.stream());
  return parts;
}

/// Gradients of e, c, f, the bias and the gate, empty where they are not wanted.
struct Gradients {
  Tensor e, c, f, bias, gate;
};

/// Fills `to` once the rows are done; `like` is on their device.
void sum_gradients(const CrossAttentionBackwardRows& p, Gradients& to, int64_t contexts, const Tensor& like,
                   const Call& call) {
  const int64_t channels = p.channels, with_one = p.columns + (p.bias.data != nullptr);
  const Vector written_gate{p.gate_copy, Number::kFloat32, 0};
  RowSums sums{};
  sums.need_down = p.ds.data != nullptr;
  sums.need_up = to.f.numel() > 0;
  if (sums.need_down) sums.z = p.x;
  sums.dy = p.dy;
  sums.dh = p.ds;
  sums.activated = p.matched.data == nullptr ? p.p : p.matched;
  sums.gamma = p.gate.data == nullptr ? written_gate : p.gate;
  sums.sample_scale = {p.rho, Number::kFloat32, 1};
  const Tensor parts = sum_rows(sums, p, channels, contexts, like, call);

  CrossAttentionGradients g{p};
  Tensor gram = empty({p.left.data == nullptr ? 0 : contexts, with_one, p.pitch}, Number::kFloat32, like);
  if (p.left.data != nullptr) {
    RowSums outer{};
    outer.z = p.right;
    outer.dh = p.left;
    outer.need_down = true;
    const Tensor outer_parts = sum_rows(outer, p, with_one, contexts, like, call);
    g.gram = mutable_data<float>(gram);
    g.largest = p.largest;
    sum_parts({outer.parts, outer.part_size, with_one * p.pitch, static_cast<int>(outer.splits / contexts),
               static_cast<int>(contexts), written(gram)},
              call.stream());
    g.kappa_sums = p.tile_numbers + 2 * p.tiles;
    g.tiles = static_cast<int>(p.tiles / contexts);
  }
  g.parts = sums.parts;
  g.part_size = sums.part_size;
  g.contexts = static_cast<int>(contexts);
  g.splits = static_cast<int>(sums.splits / contexts);
  g.pitch = p.pitch;
  g.root = p.root;
  g.wide_dy = p.dy.number == Number::kFloat32;
  g.d_e = written(to.e);
  g.d_f = written(to.f);
  g.d_bias = written(to.bias);
  g.d_gate = written(to.gate);
  if (to.c.numel() > 0) {
    g.d_c = written(to.c);
    g.logit_groups = to.c.size(0);
    if (g.logit_groups > contexts) {
      // A mask of each image over a context that they share.
      g.logit_parts = {p.ds.data, p.number, p.pitch};
      g.logit_count = p.length;
    } else {
      g.logit_parts = {sums.parts + 2 * channels * p.pitch, Number::kFloat32, sums.part_size};
      g.logit_count = sums.splits / g.logit_groups;
    }
  }
  const bool each = contexts > 1 && sums.need_up;
  if (!each) return cross_attention_gradients(g, call.stream());
  // Bias and gate serve all contexts: one gradient for each context, and their sum.
  Tensor of_contexts = empty({2, contexts, channels}, Number::kFloat32, like);
  float* const first = mutable_data<float>(of_contexts);
  if (g.d_bias.data != nullptr) g.d_bias = {first, Number::kFloat32, 1};
  g.d_gate = {first + contexts * channels, Number::kFloat32, 1};
  cross_attention_gradients(g, call.stream());
  const auto add_up = [&](const Vector& from, const Tensor& sum) {
    sum_parts({static_cast<const float*>(from.data), channels, channels, static_cast<int>(contexts), 1, written(sum)},
              call.stream());
  };
  if (g.d_bias.data != nullptr) add_up(g.d_bias, to.bias);
  add_up(g.d_gate, to.gate);
}

}  // namespace

std::tuple<Tensor, Tensor> cross_attention_residual_fwd(const Tensor& x, const Tensor& e, const OptionalTensor& c,
                                                        const Tensor& f, const OptionalTensor& bias,
                                                        const OptionalTensor& gate, const OptionalTensor& seed,
                                                        double weight, bool norm_match, double eps, double dropout_p,
                                                        bool save) {
  const Call call(x);
  const int64_t batch = x.size(0), length = x.size(1), columns = e.size(1) * e.size(2);
  Tensor y = empty(x.sizes(), number_of(x), x);
  Tensor kept = save ? empty({batch, length, columns}, number_of(e), e) : nothing(e);
  if (batch * length == 0) return {y, kept};
  const OptionalTensor gate_numbers = held(gate);
  CrossAttentionForward p{
      attention_of(batch, length, e, c, f, bias, gate_numbers, seed, weight, norm_match, eps, dropout_p)};
  const Tensor rows = rows_of(x, e);
  p.x = const_rows(rows);
  p.y = mutable_rows(y);
  if (save) p.p = mutable_rows(kept);
  cross_attention_forward(p, call.stream());
  return {y, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_attention_residual_bwd(
    const Tensor& dy, const OptionalTensor& x, const Tensor& e, const OptionalTensor& c, const Tensor& f,
    const OptionalTensor& bias, const OptionalTensor& gate, const OptionalTensor& kept, const OptionalTensor& seed,
    double weight, bool norm_match, double eps, double dropout_p, bool need_dx, bool need_keys, bool need_values) {
  const Call call(dy);
  const int64_t batch = dy.size(0), length = dy.size(1), channels = dy.size(2), rows = batch * length;
  const auto gradient = [&](const OptionalTensor& of, bool needed) {
    return of && needed ? empty(of->sizes(), number_of(*of), *of) : nothing(e);
  };
  // 16 bits do not hold a sum over rows.
  const auto wide_gradient = [&](const Tensor& of, bool needed) {
    return needed ? empty(of.sizes(), Number::kFloat32, of) : empty({0}, Number::kFloat32, of);
  };
  Tensor dx = need_dx ? empty(dy.sizes(), number_of(dy), dy) : nothing(dy);
  Gradients to{wide_gradient(e, need_keys), gradient(c, need_keys), wide_gradient(f, need_values),
               gradient(bias, need_values), empty({need_values ? channels : 0}, Number::kFloat32, dy)};
  if (rows == 0) {
    for (Tensor* empty_sum : {&to.e, &to.c, &to.f, &to.bias, &to.gate}) torch::stable::zero_(*empty_sum);
    return {dx, to.e, to.c, to.f, to.bias, to.gate};
  }
  const OptionalTensor gate_numbers = held(gate);
  CrossAttentionBackwardRows p{
      attention_of(batch, length, e, c, f, bias, gate_numbers, seed, weight, norm_match, eps, dropout_p)};
  const auto whole_eights = [](int64_t width) { return (width + 7) / 8 * 8; };
  const int64_t pitch = whole_eights(p.columns), one_pitch = whole_eights(p.columns + (bias ? 1 : 0));
  p.recompute = !kept;
  p.pitch = static_cast<int>(pitch);
  p.root = std::abs(p.weight) < 1e-30f ? 1.0f : std::sqrt(std::abs(p.weight));
  const Tensor dy_rows = rows_of(dy, e), x_rows = x ? rows_of(*x, e) : nothing(e);
  p.dy = const_rows(dy_rows);
  if (x) p.x = const_rows(x_rows);
  if (need_dx) p.dx = mutable_rows(dx);

  const bool matches_values = norm_match && need_values;
  const auto matrix = [&](bool needed, int64_t width) { return empty({needed ? rows : 0, width}, p.number, e); };
  const auto made_rows = [&](const Tensor& made) {
    return made.numel() == 0 ? Rows() : by_rows(mutable_rows(made), length);
  };
  const auto floats = [&](int64_t count) { return empty({count}, Number::kFloat32, e); };
  const Tensor made = matrix(p.recompute, pitch), ds = matrix(need_keys, pitch);
  p.p = p.recompute ? made_rows(made) : const_rows(*kept);
  // Where a is p, and in whole eights, the sums read it as it is.
  const bool as_it_is = !seed && !norm_match && p.p.stride_l == pitch;
  const Tensor matched = matrix(need_values && !as_it_is, pitch);
  const Tensor left = matrix(matches_values, pitch), right = matrix(matches_values, one_pitch);
  p.tiles = cross_attention_tiles(p);
  const Tensor rho = floats(matches_values ? rows : 0), kappa = floats(matches_values ? rows : 0);
  const Tensor tile_numbers = floats(matches_values ? 3 * p.tiles : 0), largest = floats(matches_values ? 2 : 0);
  const Tensor gate_copy = floats(gate ? 0 : 1);
  p.ds = made_rows(ds);
  p.matched = made_rows(matched);
  p.left = made_rows(left);
  p.right = made_rows(right);
  p.rho = static_cast<float*>(written(rho).data);
  p.kappa = static_cast<float*>(written(kappa).data);
  p.tile_numbers = static_cast<float*>(written(tile_numbers).data);
  p.largest = static_cast<float*>(written(largest).data);
  p.gate_copy = static_cast<float*>(written(gate_copy).data);
  cross_attention_backward_rows(p, call.stream());
  if (matches_values) cross_attention_weigh(p, call.stream());
  if (need_keys || need_values) sum_gradients(p, to, e.size(0), dy, call);
  return {dx, to.e, to.c, to.f, to.bias, to.gate};
}

}  // namespace pyfused
