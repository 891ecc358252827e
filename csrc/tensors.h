// What a kernel is told of torch's tensors, through the stable ABI of torch 2.10 alone.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "types.h"

#ifdef PYFUSED_EMULATOR
#include "emulator.h"
#endif

namespace pyfused {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace detail {

/// The emulator lets kernels touch what was exposed, from the first element to the end of the last.
inline void expose([[maybe_unused]] const Tensor& tensor, [[maybe_unused]] const void* data,
                   [[maybe_unused]] bool writable) {
#ifdef PYFUSED_EMULATOR
  if (tensor.numel() == 0) return;
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  emulator::expose(data, (last + 1) * tensor.element_size(), writable);
#endif
}

}  // namespace detail

template <class T>
const T* const_data(const Tensor& tensor) {
  const void* data = tensor.const_data_ptr();
  detail::expose(tensor, data, false);
  return static_cast<const T*>(data);
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  void* data = tensor.mutable_data_ptr();
  detail::expose(tensor, data, true);
  return static_cast<T*>(data);
}

/// Null where there is no tensor.
template <class T>
const T* const_data(const OptionalTensor& tensor) {
  return tensor ? const_data<T>(*tensor) : nullptr;
}

template <class T>
T* mutable_data(const OptionalTensor& tensor) {
  return tensor ? mutable_data<T>(*tensor) : nullptr;
}

inline Number number_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (const ScalarType type = tensor.scalar_type()) {
    case ScalarType::Float: return Number::kFloat32;
    case ScalarType::Half: return Number::kFloat16;
    case ScalarType::BFloat16: return Number::kBFloat16;
    default:
      throw std::runtime_error(std::string("pyfused: the kernels take float32, float16 and bfloat16, got ") +
                               torch::headeronly::toString(type));
  }
}

/// Numbers of a type that the kernels take.
inline OptionalTensor held(const OptionalTensor& numbers) {
  using torch::headeronly::ScalarType;
  if (!numbers || numbers->scalar_type() != ScalarType::Double) return numbers;
  return torch::stable::to(*numbers, ScalarType::Float);
}

namespace detail {

inline Rows rows(const Tensor& tensor, void* data) {
  const int64_t dim = tensor.dim();
  if (dim != 2 && dim != 3) {
    throw std::runtime_error("pyfused: expected a tensor of 2 or 3 dimensions, got " + std::to_string(dim));
  }
  Rows rows;
  rows.data = data;
  rows.number = number_of(tensor);
  rows.stride_b = dim == 3 ? tensor.stride(0) : 0;
  rows.stride_l = tensor.stride(dim - 2);
  rows.stride_c = tensor.stride(dim - 1);
  return with_access(rows);
}

}  // namespace detail

/// A tensor (B, L, C), or a weight (N, K); only read.
inline Rows const_rows(const Tensor& tensor) {
  return detail::rows(tensor, const_cast<void*>(const_data<void>(tensor)));
}
inline Rows const_rows(const OptionalTensor& tensor) { return tensor ? const_rows(*tensor) : Rows(); }

inline Rows mutable_rows(const Tensor& tensor) { return detail::rows(tensor, mutable_data<void>(tensor)); }

/// A tensor (n,), or of one element that serves all; only read.
inline Vector const_vector(const OptionalTensor& tensor) {
  if (!tensor) return {};
  const int64_t stride = tensor->numel() == 1 ? 0 : tensor->stride(0);
  return {const_cast<void*>(const_data<void>(*tensor)), number_of(*tensor), stride};
}

/// The elements of a contiguous tensor, to be written; none where it is empty.
inline Vector written(const Tensor& tensor) {
  return tensor.numel() == 0 ? Vector() : Vector{mutable_data<void>(tensor), number_of(tensor), 1};
}

/// A contiguous (M, width) matrix as the rows of a (B, L, C) tensor.
inline Rows by_rows(Rows matrix, int64_t length) {
  matrix.stride_b = length * matrix.stride_l;
  return with_access(matrix);
}

inline Dropout dropout(const OptionalTensor& seed, double p) {
  if (!seed) return {};
  return {const_data<int64_t>(seed), static_cast<uint32_t>(p * 4294967296.0), static_cast<float>(1.0 / (1.0 - p))};
}

/// An uninitialised contiguous tensor on the device of `like`.
inline Tensor empty(IntHeaderOnlyArrayRef sizes, Number number, const Tensor& like) {
  using torch::headeronly::ScalarType;
  const ScalarType type = number == Number::kFloat32   ? ScalarType::Float
                          : number == Number::kFloat16 ? ScalarType::Half
                                                       : ScalarType::BFloat16;
  return torch::stable::new_empty(like, sizes, type);
}

/// An uninitialised (B, L, width) tensor for x (B, L, C), laid out in memory as (B, width, L) when `channels_first`.
inline Tensor rows_like(const Tensor& x, int64_t width, bool channels_first, Number number) {
  if (!channels_first) return empty({x.size(0), x.size(1), width}, number, x);
  return torch::stable::transpose(empty({x.size(0), width, x.size(1)}, number, x), 1, 2);
}
inline Tensor rows_like(const Tensor& x, int64_t width, bool channels_first) {
  return rows_like(x, width, channels_first, number_of(x));
}

}  // namespace pyfused
