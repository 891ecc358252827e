#include "launch.h"

#ifdef __CUDACC__
#include <map>
#include <mutex>
#endif

namespace pyfused {

std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}

std::string detail::kernel_name(const char* pretty_function) {
  static const std::string kBefore = "kKernel = ", kNamespace = "pyfused::";
  std::string name = pretty_function;
  name = name.substr(name.find(kBefore) + kBefore.size());
  name.erase(name.rfind(']'));
  for (size_t at; (at = name.find(kNamespace)) != std::string::npos;) name.erase(at, kNamespace.size());
  return name;
}

#ifdef __CUDACC__

namespace {

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, index);
  if (error != cudaSuccess) throw std::runtime_error(std::string("cudaDeviceGetAttribute: ") + cudaGetErrorString(error));
  return value;
}

}  // namespace

const Device& current_device() {
  static std::mutex mutex;
  static std::map<int, Device> devices;
  int index = 0;
  const cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) throw std::runtime_error(std::string("cudaGetDevice: ") + cudaGetErrorString(error));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = devices.find(index);
  if (found != devices.end()) return found->second;
  const int capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index);
  const Device device{capability, attribute(cudaDevAttrMultiProcessorCount, index),
                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
  return devices.emplace(index, device).first->second;
}

#endif

}  // namespace pyfused
