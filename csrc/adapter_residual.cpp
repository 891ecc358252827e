// The torch side of adapter_residual; pyfused/ops/adapter_residual.py has the contract.
#include "adapter_residual.h"

#include <stdexcept>
#include <string>

#include "call.h"
#include "operators.h"

namespace pyfused {
namespace {

Tensor nothing(Number number, const Tensor& like) { return empty({0}, number, like); }

/// A weight in the 16-bit type of the products: itself, or one cast copy for all tiles.
Tensor narrow(const Tensor& weight, const Tensor& like) {
  if (weight.scalar_type() == like.scalar_type()) return weight;
  return torch::stable::to(weight, like.scalar_type());
}

/// What both directions read, for rows (batch, length) whose products are made in the type of `like`.
Adapter adapter_of(int64_t batch, int64_t length, const Tensor& like, const Tensor& down, const OptionalTensor& down_bias,
                   const Tensor& up, const OptionalTensor& up_bias, const OptionalTensor& layer_scale,
                   const OptionalTensor& sample_scale, const OptionalTensor& seed, double skip,
                   const std::string& activation, double dropout_p) {
  if (batch * length > INT32_MAX) {
    throw std::runtime_error("adapter_residual: backend 'cuda' takes fewer than 2^31 rows, got " +
                             std::to_string(batch * length));
  }
  Adapter p{};
  p.down = const_rows(down);
  p.up = const_rows(up);
  p.down_bias = const_vector(down_bias);
  p.up_bias = const_vector(up_bias);
  p.gamma = const_vector(layer_scale);
  p.sample_scale = const_vector(sample_scale);
  p.batch = batch;
  p.length = length;
  p.per_sample = sample_scale ? batch * length / sample_scale->numel() : 1;
  p.channels = static_cast<int>(down.size(1));
  p.width = static_cast<int>(down.size(0));
  p.skip = static_cast<float>(skip);
  p.activation = activation_named(activation);
  p.dropout = dropout(seed, dropout_p);
  p.number = number_of(like);
  return p;
}

}  // namespace

std::tuple<Tensor, Tensor> adapter_residual_fwd(const Tensor& z, const Tensor& down_weight,
                                                const OptionalTensor& down_bias, const Tensor& up_weight,
                                                const OptionalTensor& up_bias, const OptionalTensor& residual,
                                                const OptionalTensor& layer_scale, const OptionalTensor& sample_scale,
                                                const OptionalTensor& seed, double skip, const std::string& activation,
                                                double dropout_p, bool channels_first, bool, bool save) {
  const Call call(z);
  const int64_t batch = z.size(0), length = z.size(1), width = down_weight.size(0);
  Tensor y = rows_like(residual ? *residual : z, z.size(2), channels_first);
  Tensor hidden = save ? empty({batch * length, width}, number_of(z), z) : nothing(number_of(z), z);
  if (batch * length == 0) return {y, hidden};
  const Tensor down = narrow(down_weight, z), up = narrow(up_weight, z);
  const OptionalTensor gamma = held(layer_scale), scale = held(sample_scale);
  AdapterForward p{adapter_of(batch, length, z, down, down_bias, up, up_bias, gamma, scale, seed, skip, activation,
                              dropout_p)};
  p.z = const_rows(z);
  p.residual = residual ? const_rows(*residual) : p.z;
  p.z_is_residual = !residual;
  p.y = mutable_rows(y);
  if (save) p.hidden = by_rows(mutable_rows(hidden), length);
  adapter_forward(p, call.stream());
  return {y, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter_residual_bwd(
    const Tensor& dy, const OptionalTensor& z, const Tensor& down_weight, const OptionalTensor& down_bias,
    const Tensor& up_weight, const OptionalTensor& up_bias, const OptionalTensor& layer_scale,
    const OptionalTensor& sample_scale, const OptionalTensor& hidden, const OptionalTensor& seed, double skip,
    const std::string& activation, double dropout_p, bool channels_first, bool z_is_residual, bool need_dz,
    bool need_down, bool need_up) {
  const Call call(dy);
  const int64_t batch = dy.size(0), length = dy.size(1), channels = dy.size(2);
  const Tensor& like = z ? *z : *hidden;
  const Number number = number_of(like);
  Tensor dz = need_dz ? rows_like(dy, channels, channels_first, number) : nothing(number, like);
  const auto gradient = [&](const OptionalTensor& parameter, bool needed) {
    if (!parameter || !needed) return nothing(number_of(up_weight), up_weight);
    return torch::stable::new_empty(*parameter, parameter->sizes());
  };
  Tensor d_down = gradient(down_weight, need_down), d_down_bias = gradient(down_bias, need_down);
  Tensor d_up = gradient(up_weight, need_up), d_up_bias = gradient(up_bias, need_up);
  Tensor d_gamma = empty({need_up ? channels : 0}, Number::kFloat32, dy);
  if (batch * length == 0) {
    for (Tensor* empty_sum : {&d_down, &d_down_bias, &d_up, &d_up_bias, &d_gamma}) torch::stable::zero_(*empty_sum);
    return {dz, d_down, d_down_bias, d_up, d_up_bias, d_gamma};
  }
  const Tensor down = narrow(down_weight, like), up = narrow(up_weight, like);
  const OptionalTensor gamma = held(layer_scale), scale = held(sample_scale);
  // Tiles are read as the products' type or as float32.
  const bool readable = number_of(dy) == number || number_of(dy) == Number::kFloat32;
  const Tensor read_dy = readable ? dy : torch::stable::to(dy, torch::headeronly::ScalarType::Float);
  const Adapter adapter = adapter_of(batch, length, like, down, down_bias, up, up_bias, gamma, scale, seed, skip,
                                     activation, dropout_p);
  AdapterGradients gradients{adapter};
  RowSums& sums = gradients.sums;
  sums.gamma = adapter.gamma;
  sums.sample_scale = adapter.sample_scale;
  sums.batch = batch;
  sums.length = length;
  sums.per_sample = adapter.per_sample;
  sums.channels = adapter.channels;
  sums.width = adapter.width;
  sums.number = number;
  lay_out_parts(sums);
  const int64_t rows = batch * length;
  Tensor dh = empty({need_down ? rows : 0, sums.pitch}, number, like);
  Tensor activated = empty({need_up ? rows : 0, sums.pitch}, number, like);

  AdapterBackwardRows p{adapter};
  if (hidden) {
    p.hidden = by_rows(const_rows(*hidden), length);
  } else {
    p.z = const_rows(*z);
  }
  p.dy = const_rows(read_dy);
  if (need_dz) p.dz = mutable_rows(dz);
  if (need_down) p.dh = by_rows(mutable_rows(dh), length);
  if (need_up) p.activated = by_rows(mutable_rows(activated), length);
  p.pitch = sums.pitch;
  p.z_is_residual = z_is_residual;
  adapter_backward_rows(p, call.stream());
  if (!need_down && !need_up) return {dz, d_down, d_down_bias, d_up, d_up_bias, d_gamma};

  Tensor parts = empty({sums.splits, sums.part_size}, Number::kFloat32, dy);
  if (z && (need_down || skip != 0.0)) sums.z = const_rows(*z);
  sums.dy = p.dy;
  sums.dh = p.dh;
  sums.activated = p.activated;
  sums.parts = mutable_data<float>(parts);
  sums.need_down = need_down;
  sums.need_up = need_up;
  sum_over_rows(sums, call.stream());

  gradients.d_down = written(d_down);
  gradients.d_down_bias = written(d_down_bias);
  gradients.d_up = written(d_up);
  gradients.d_up_bias = written(d_up_bias);
  gradients.d_gamma = need_up ? mutable_data<float>(d_gamma) : nullptr;
  adapter_gradients(gradients, call.stream());
  return {dz, d_down, d_down_bias, d_up, d_up_bias, d_gamma};
}

}  // namespace pyfused
