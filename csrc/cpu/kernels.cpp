#include "kernels.h"

#include <cstring>

#include "build_info.h"

namespace pyfused {

// One compilation of adapter_residual_kernels.cpp and low_rank_kernels.cpp each.
#define PYFUSED_SET(set)                          \
  namespace set {                                 \
  extern const AdapterKernels adapter_residual;   \
  extern const LowRankKernels low_rank;           \
  }
PYFUSED_SET(kernels_baseline)
#if defined(__x86_64__)
PYFUSED_SET(kernels_avx2)
PYFUSED_SET(kernels_avx512)
#endif

namespace {

struct InstructionSet {
  const char* name;
  bool runs;
  const AdapterKernels* adapter_residual;
  const LowRankKernels* low_rank;
};

/// The widest first.
const InstructionSet* sets() {
#if defined(__x86_64__)
  // These answers take into account what the operating system saves of the registers.
  static const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const InstructionSet found[] = {
      {"avx512", avx512, &kernels_avx512::adapter_residual, &kernels_avx512::low_rank},
      {"avx2", avx2, &kernels_avx2::adapter_residual, &kernels_avx2::low_rank},
      {"baseline", true, &kernels_baseline::adapter_residual, &kernels_baseline::low_rank},
      {}};
#else
  static const InstructionSet found[] = {
      {"baseline", true, &kernels_baseline::adapter_residual, &kernels_baseline::low_rank}, {}};
#endif
  return found;
}

const InstructionSet* widest() {
  const InstructionSet* set = sets();
  while (!set->runs) ++set;
  return set;
}

const InstructionSet* taken = widest();

}  // namespace

const AdapterKernels& adapter_kernels() { return *taken->adapter_residual; }
const LowRankKernels& low_rank_kernels() { return *taken->low_rank; }

}  // namespace pyfused

#define PYFUSED_EXPORT extern "C" __attribute__((visibility("default")))

/// What it was built with, as JSON.
PYFUSED_EXPORT const char* pyfused_cpu_build_info() { return PYFUSED_BUILD_INFO; }

/// The name of the instruction set that is taken.
PYFUSED_EXPORT const char* pyfused_cpu_instruction_set() { return pyfused::taken->name; }

/// Take another, for tests; false where this machine or this library has it not.
PYFUSED_EXPORT bool pyfused_cpu_take(const char* name) {
  for (const auto* set = pyfused::sets(); set->name; ++set) {
    if (std::strcmp(set->name, name) == 0 && set->runs) {
      pyfused::taken = set;
      return true;
    }
  }
  return false;
}
