// The operators of binding.cpp that no other library has: one function per schema, its arguments in the schema's order.
#pragma once

#include "../operators.h"

namespace pyfused {

void low_rank_fwd(const Tensor& y, const OptionalTensor& kept, const Tensor& x, const Tensor& lora_a,
                  const Tensor& lora_b, const Tensor& adapter_index, int64_t adapters, double scaling);
void low_rank_bwd(const OptionalTensor& dx, const OptionalTensor& d_a, const OptionalTensor& d_b, const Tensor& dy,
                  const OptionalTensor& x, const Tensor& lora_a, const Tensor& lora_b, const OptionalTensor& kept,
                  const Tensor& adapter_index, int64_t adapters, double scaling);

}  // namespace pyfused
