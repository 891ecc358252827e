// Launches a kernel on the current device, or in the emulator. A kernel takes one struct by value.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#ifndef __CUDACC__
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace pyfused {

/// What launch configurations are chosen by.
struct Device {
  int capability;  // 10 major + minor
  int multiprocessors;
  int shared_memory;  // bytes that one block can have
};

/// The current device's.
const Device& current_device();

/// One instantiated kernel: its name with template arguments, and where it is.
struct Kernel {
  std::string name;
  const void* function;
};

/// Every kernel that some `launch` was compiled for.
std::vector<Kernel>& kernels();

namespace detail {

/// The kernel's name out of what the compiler calls `registered<kernel>`.
std::string kernel_name(const char* pretty_function);

template <auto kKernel>
int add_kernel() {
  kernels().push_back({kernel_name(__PRETTY_FUNCTION__), reinterpret_cast<const void*>(kKernel)});
  return static_cast<int>(kernels().size()) - 1;
}

template <auto kKernel>
struct Registered {
  // Initialised when the library is loaded, for every kernel that is launched anywhere in it.
  static inline const int index = add_kernel<kKernel>();
};

}  // namespace detail

/// Starts `kKernel` on `stream`; throws std::runtime_error with the kernel's name when it cannot be started.
template <auto kKernel, class Parameters>
void launch(dim3 grid, int threads, int shared_bytes, void* stream, const Parameters& parameters) {
  const Kernel& kernel = kernels()[detail::Registered<kKernel>::index];
#ifndef __CUDACC__
  (void)stream;
  emulator::launch(kernel.name, grid, threads, shared_bytes, [&parameters] { kKernel(parameters); });
#else
  const auto check = [&kernel](cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(kernel.name + ": " + cudaGetErrorString(error));
  };
  // The default lets a kernel have 48 KB. Not `shared_bytes`: another thread may be launching it with more or less.
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               current_device().shared_memory));
  }
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  check(cudaLaunchKernel(kernel.function, grid, dim3(threads), arguments, shared_bytes,
                         static_cast<cudaStream_t>(stream)));
#endif
}

}  // namespace pyfused
