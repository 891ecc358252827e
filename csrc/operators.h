// The operators of binding.cpp: one function per schema of pyfused/ops, its arguments in the schema's order.
#pragma once

#include <string>
#include <tuple>

#include "tensors.h"

namespace pyfused {

std::tuple<Tensor, Tensor> adapter_residual_fwd(const Tensor& z, const Tensor& down_weight,
                                                const OptionalTensor& down_bias, const Tensor& up_weight,
                                                const OptionalTensor& up_bias, const OptionalTensor& residual,
                                                const OptionalTensor& layer_scale, const OptionalTensor& sample_scale,
                                                const OptionalTensor& seed, double skip, const std::string& activation,
                                                double dropout_p, bool channels_first, bool z_channels_first,
                                                bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter_residual_bwd(
    const Tensor& dy, const OptionalTensor& z, const Tensor& down_weight, const OptionalTensor& down_bias,
    const Tensor& up_weight, const OptionalTensor& up_bias, const OptionalTensor& layer_scale,
    const OptionalTensor& sample_scale, const OptionalTensor& hidden, const OptionalTensor& seed, double skip,
    const std::string& activation, double dropout_p, bool channels_first, bool z_is_residual, bool need_dz,
    bool need_down, bool need_up);

std::tuple<Tensor, Tensor> cross_attention_residual_fwd(const Tensor& x, const Tensor& e, const OptionalTensor& c,
                                                        const Tensor& f, const OptionalTensor& bias,
                                                        const OptionalTensor& gate, const OptionalTensor& seed,
                                                        double weight, bool norm_match, double eps, double dropout_p,
                                                        bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_attention_residual_bwd(
    const Tensor& dy, const OptionalTensor& x, const Tensor& e, const OptionalTensor& c, const Tensor& f,
    const OptionalTensor& bias, const OptionalTensor& gate, const OptionalTensor& kept, const OptionalTensor& seed,
    double weight, bool norm_match, double eps, double dropout_p, bool need_dx, bool need_keys, bool need_values);

std::tuple<Tensor, Tensor> lora_linear_fwd(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                           const Tensor& lora_b, const OptionalTensor& bias, const OptionalTensor& seed,
                                           double scaling, double dropout_p, bool channels_first,
                                           const std::string& plan, bool save);
std::tuple<Tensor, Tensor, Tensor> lora_linear_bwd(const Tensor& dy, const OptionalTensor& x,
                                                   const OptionalTensor& weight, const Tensor& lora_a,
                                                   const Tensor& lora_b, const OptionalTensor& p,
                                                   const OptionalTensor& seed, double scaling, double dropout_p,
                                                   bool channels_first, const std::string& plan, bool need_dx,
                                                   bool need_da, bool need_db);

}  // namespace pyfused
