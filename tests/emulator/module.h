// What every Python module of emulated kernels has.
#pragma once

#include <pybind11/pybind11.h>

#include "launch.h"

namespace pyfused {

inline void add_emulate(pybind11::module_& module) {
  namespace py = pybind11;
  const auto emulate = [](int capability, int multiprocessors, int shared_memory, uint64_t seed) {
    emulator::emulate({capability, multiprocessors, shared_memory}, seed);
  };
  // Nobody has set another yet.
  const Device& device = current_device();
  module.def("emulate", emulate, "Sets the emulated device and the seed of the order in which threads run.",
             py::arg("capability") = device.capability, py::arg("multiprocessors") = device.multiprocessors,
             py::arg("shared_memory") = device.shared_memory, py::arg("seed") = 0);
}

}  // namespace pyfused
