// The torch side of a launch: the device and the stream that it goes to.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "tensors.h"

#ifndef PYFUSED_EMULATOR
// A torch without CUDA lacks it, and loads the library all the same.
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace pyfused {

/// The launches of one operator call: the tensor's device is current meanwhile, and they go to its current stream.
class Call {
 public:
#ifdef PYFUSED_EMULATOR
  explicit Call(const Tensor&) {}
  ~Call() { emulator::clear(); }
#else
  explicit Call(const Tensor& tensor) : guard_(checked_index(tensor)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
#endif
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  void* stream() const { return stream_; }

 private:
#ifndef PYFUSED_EMULATOR
  static int32_t checked_index(const Tensor& tensor) {
    if (!tensor.is_cuda()) throw std::runtime_error("pyfused: the kernels take CUDA tensors, got one elsewhere");
    if (!aoti_torch_get_current_cuda_stream) throw std::runtime_error("pyfused: this torch was built without CUDA");
    return tensor.get_device_index();
  }

  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

}  // namespace pyfused
