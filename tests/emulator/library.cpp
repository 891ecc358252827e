// The Python face of the library with the kernels of all operators.
#include "module.h"

PYBIND11_MODULE(emulated, module) { pyfused::add_emulate(module); }
