#include "isa.hpp"

#include <stdexcept>

namespace fave_fast {
namespace {

std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> found;
#if defined(FAVE_FAST_X86)
  // These ask the operating system too whether it saves the registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni && __builtin_cpu_supports("avx512bf16")) found.push_back(&kKernelsAvx512Bf16);
  if (vnni) found.push_back(&kKernelsAvx512Vnni);
  if (avx512) found.push_back(&kKernelsAvx512);
  if (avx2) found.push_back(&kKernelsAvx2);
#endif
  found.push_back(&kKernelsScalar);
  return found;
}

const std::vector<const Kernels*>& all_usable() {
  static const std::vector<const Kernels*> found = usable();
  return found;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : all_usable()) names.emplace_back(kernels->name);
  return names;
}

const Kernels& kernels_for(const std::string& name) {
  std::string offered;
  for (const Kernels* kernels : all_usable()) {
    if (name.empty() || name == kernels->name) return *kernels;
    offered += (offered.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("instruction set '" + name + "' cannot run here; expected one of " + offered);
}

}  // namespace fave_fast
