// The Python module of the kernels that the emulator is tested with. All of it is in this file, and no kernel:
// pybind11's headers take several times as long to compile as one.
#include "tests.h"

#include <pybind11/numpy.h>

#include <tuple>

#include "gemm_cost.h"
#include "module.h"

namespace pyfused {
namespace {

namespace py = pybind11;

// 16-bit numbers come as their bits, since NumPy has no bfloat16.
template <class T>
using Array = py::array_t<T, 0>;

/// An argument that is taken as it is: of what pybind11 converts, the kernel would have a copy.
py::arg same(const char* name) { return py::arg(name).noconvert(); }

/// No array stays exposed after the call.
struct Exposure {
  ~Exposure() { emulator::clear(); }
};

/// Lets kernels touch an array from its first element to the end of its last.
void expose(const py::array& array, bool writable) {
  py::ssize_t last = 0;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) last += (array.shape(i) - 1) * array.strides(i);
  emulator::expose(array.data(), last + array.itemsize(), writable);
}

template <class T>
const T* read(const Array<T>& array) {
  expose(array, false);
  return array.data();
}

template <class T>
T* written(Array<T>& array) {
  expose(array, true);
  return array.mutable_data();
}

template <class T>
Matrix matrix(const Array<T>& array, const T* data) {
  if (array.ndim() != 2 || array.strides(1) != sizeof(T)) throw py::value_error("expected a matrix of contiguous rows");
  return {const_cast<T*>(data), static_cast<int>(array.shape(0)), static_cast<int>(array.shape(1)),
          static_cast<int>(array.strides(0) / sizeof(T))};
}

template <class T>
Matrix read_matrix(const Array<T>& array) {
  return matrix(array, read(array));
}

template <class T>
Matrix written_matrix(Array<T>& array) {
  return matrix<T>(array, written(array));
}

using Bits = Array<uint16_t>;
using Words = Array<uint32_t>;

// Messages number the buffers in the order in which they are exposed.

void bind_gemm(bool bf16, const Bits& a, const Bits& b, Array<float> c, int mistake) {
  const Matrix left = read_matrix(a), right = read_matrix(b), product = written_matrix(c);
  gemm(bf16, left, right, product, mistake);
}

void bind_probe(const std::string& name, const Words& given, Words found, std::tuple<int, int, int> grid, int threads,
                int shared_bytes) {
  const uint32_t* in = read(given);
  uint32_t* out = written(found);
  const auto [x, y, z] = grid;
  probe(name, in, out, dim3(x, y, z), threads, shared_bytes);
}

void bind_adapter_forward(const Bits& z, const Bits& down, const Bits& up, Bits y, Bits hidden, int stages) {
  const Matrix rows = read_matrix(z), first = read_matrix(down), second = read_matrix(up);
  const Matrix result = written_matrix(y), middle = written_matrix(hidden);
  adapter_forward(rows, first, second, result, middle, stages);
}

void bind_philox_words(int64_t seed, int64_t first_row, uint32_t first_quad, Words words) {
  philox_words(seed, first_row, first_quad, written(words));
}

std::tuple<int, int, int> device() {
  const Device& device = current_device();
  return {device.capability, device.multiprocessors, device.shared_memory};
}

uint16_t rounded(bool bf16, float x) { return bf16 ? from_float<bfloat16>(x).bits : from_float<float16>(x).bits; }

uint16_t rounded_in_pair(bool bf16, float x) {
  const uint32_t pair = bf16 ? pack<bfloat16>(x, 0.0f) : pack<float16>(0.0f, x);
  return static_cast<uint16_t>(bf16 ? pair : pair >> 16);
}

float widened(bool bf16, uint16_t bits) { return bf16 ? to_float(bfloat16{bits}) : to_float(float16{bits}); }

}  // namespace

PYBIND11_MODULE(emulated, module) {
  add_emulate(module);
  const py::call_guard<Exposure> guard;
  module.def("gemm", bind_gemm, guard, py::arg("bf16"), same("a"), same("b"), same("c"), py::arg("mistake"));
  module.def("probe", bind_probe, guard, py::arg("name"), same("given"), same("found"), py::arg("grid"),
             py::arg("threads"), py::arg("shared_bytes"));
  module.def("adapter_forward", bind_adapter_forward, guard, same("z"), same("down"), same("up"), same("y"),
             same("hidden"), py::arg("stages"));
  module.def("philox_words", bind_philox_words, guard, py::arg("seed"), py::arg("first_row"), py::arg("first_quad"),
             same("words"));
  module.def("device", device);
  module.def("gemm_cost", gemm_cost);
  module.def("products_of_mma_sync", products_of_mma_sync);
  module.def("rounded", py::vectorize(rounded));
  module.def("rounded_in_pair", py::vectorize(rounded_in_pair));
  module.def("widened", py::vectorize(widened));
}

}  // namespace pyfused
