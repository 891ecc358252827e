// The torch side of lora_linear; pyfused/ops/lora_linear.py has the contract.
#include "lora_linear.h"

#include <stdexcept>
#include <string>

#include "call.h"
#include "operators.h"

namespace pyfused {
namespace {

/// A matrix of the operator: x's 16-bit type, or float32 where `or_float`.
Rows matrix(const char* name, const Tensor& tensor, const Rows& x, bool or_float) {
  const Rows rows = const_rows(tensor);
  if (rows.number != x.number && !(or_float && rows.number == Number::kFloat32)) {
    throw std::runtime_error(std::string("lora_linear: ") + name + " must have x's dtype" +
                             (or_float ? " or float32" : "") + " on backend 'cuda'");
  }
  return rows;
}

LoraGemm gemm_of(const char* name, const Rows& x, int64_t batch, int64_t length, double scaling, double p_scaling) {
  if (x.number == Number::kFloat32) {
    throw std::runtime_error(std::string("lora_linear: ") + name +
                             " must have dtype float16 or bfloat16 on backend 'cuda', got float32");
  }
  LoraGemm g{};
  g.x = x;
  g.batch = batch;
  g.length = length;
  g.scaling = static_cast<float>(scaling);
  g.p_scaling = static_cast<float>(p_scaling);
  return g;
}

LoraSum sum_of(const Rows& t, const Rows& p, const Rows& gradient, int64_t channels, double factor) {
  LoraSum sum{};
  sum.t = t;
  sum.p = p;
  sum.gradient = gradient;
  sum.channels = static_cast<int>(channels);
  sum.factor = static_cast<float>(factor);
  return sum;
}

}  // namespace

std::tuple<Tensor, Tensor> lora_linear_fwd(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                           const Tensor& lora_b, const OptionalTensor& bias, const OptionalTensor& seed,
                                           double scaling, double dropout_p, bool channels_first, const std::string&,
                                           bool save) {
  const Call call(x);
  const int64_t batch = x.size(0), length = x.size(1), rank = lora_a.size(0);
  Tensor y = rows_like(x, weight.size(0), channels_first);
  Tensor p = empty({save ? batch * length : 0, rank}, number_of(x), x);
  if (batch * length == 0) return {y, p};
  LoraGemm g = gemm_of("x", const_rows(x), batch, length, scaling, 1.0);
  g.weight = matrix("weight", weight, g.x, false);
  g.a = matrix("lora_a", lora_a, g.x, true);
  g.b = matrix("lora_b", lora_b, g.x, true);
  g.bias = const_vector(bias);
  g.y = mutable_rows(y);
  if (save) g.p = by_rows(mutable_rows(p), length);
  g.k = static_cast<int>(x.size(2));
  g.n = static_cast<int>(weight.size(0));
  g.rank = static_cast<int>(rank);
  g.dropout = dropout(seed, dropout_p);
  lora_gemm(g, call.stream());
  return {y, p};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_bwd(const Tensor& dy, const OptionalTensor& x,
                                                   const OptionalTensor& weight, const Tensor& lora_a,
                                                   const Tensor& lora_b, const OptionalTensor& p,
                                                   const OptionalTensor& seed, double scaling, double dropout_p,
                                                   bool channels_first, const std::string&, bool need_dx, bool need_da,
                                                   bool need_db) {
  const Call call(dy);
  const int64_t batch = dy.size(0), length = dy.size(1), n = dy.size(2), rank = lora_a.size(0), k = lora_a.size(1);
  const Rows dy_rows = const_rows(dy);
  const Rows a = matrix("lora_a", lora_a, dy_rows, true), b = matrix("lora_b", lora_b, dy_rows, true);
  Tensor dx = need_dx ? rows_like(dy, k, channels_first) : empty({0}, dy_rows.number, dy);
  Tensor da = need_da ? empty({rank, k}, a.number, dy) : empty({0}, a.number, dy);
  Tensor db = need_db ? empty({n, rank}, b.number, dy) : empty({0}, b.number, dy);
  const bool any_rows = batch * length > 0;
  const Tensor q = empty({any_rows && need_da ? batch * length : 0, rank}, dy_rows.number, dy);
  if (any_rows && (need_dx || need_da)) {
    LoraGemm g = gemm_of("dy", dy_rows, batch, length, 1.0, scaling);
    g.a = transposed(b);
    g.k = static_cast<int>(n);
    g.rank = static_cast<int>(rank);
    if (need_da) g.p = by_rows(mutable_rows(q), length);
    if (need_dx) {
      g.weight = transposed(matrix("weight", *weight, dy_rows, false));
      g.b = transposed(a);
      g.y = mutable_rows(dx);
      g.n = static_cast<int>(k);
      g.dropout = dropout(seed, dropout_p);
      g.drop_term = seed.has_value();
    }
    lora_gemm(g, call.stream());
  }
  if (!need_da && !need_db) return {dx, da, db};

  LoraSums sums{};
  sums.batch = batch;
  sums.length = length;
  sums.rank = static_cast<int>(rank);
  if (need_db) {
    sums.sums[sums.count++] = sum_of(dy_rows, by_rows(const_rows(p), length), mutable_rows(db), n, scaling);
  }
  if (need_da) {
    LoraSum& sum = sums.sums[sums.count++];
    sum = sum_of(const_rows(x), by_rows(const_rows(q), length), transposed(mutable_rows(da)), k, 1.0);
    sum.dropout = dropout(seed, dropout_p);
    sum.factor *= sum.dropout.inverse_keep;
  }
  lay_out_parts(sums);
  const int64_t first = floats_of_parts(sums, 0), second = sums.count == 2 ? floats_of_parts(sums, 1) : 0;
  Tensor parts = empty({first + second}, Number::kFloat32, dy);
  sums.sums[0].parts = mutable_data<float>(parts);
  sums.sums[1].parts = sums.sums[0].parts + first;
  lora_sums(sums, call.stream());
  return {dx, da, db};
}

}  // namespace pyfused
