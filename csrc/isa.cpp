#include "isa.hpp"

#include <stdexcept>

#if defined(FAVE_FAST_AVX512) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fave_fast {
namespace {

#if defined(FAVE_FAST_AVX512)
// Whether this processor has tiles of bfloat16 and the system lets the process use them, for which it is asked: Linux
// saves their 8 KB for a process that said so alone (arch_prctl(2)).
bool tiles_granted() {
#if defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kTile) != 0 && (d & kBf16) != 0 &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> found;
#if defined(FAVE_FAST_X86)
  // These ask the operating system too whether it saves the registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(FAVE_FAST_AVX512)
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  if (bf16 && tiles_granted()) found.push_back(&kKernelsAmxBf16);
  if (bf16) found.push_back(&kKernelsAvx512Bf16);
  if (vnni) found.push_back(&kKernelsAvx512Vnni);
  if (avx512) found.push_back(&kKernelsAvx512);
#endif
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
