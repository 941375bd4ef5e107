#include "common/cpu_level.h"

#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace llada {
namespace {

constexpr CpuLevel kLevels[] = {CpuLevel::portable,    CpuLevel::avx2, CpuLevel::avx512,
                                CpuLevel::avx512_bf16, CpuLevel::amx,  CpuLevel::amx_emulated};

#if defined(__x86_64__)
// Tiles and their bf16 products, enabled by the system, and this process permitted to use them: without permission (for all threads,
// asked for once) the first tile instruction would end the process.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kOsXsave = 1u << 27, kTileStates = 3u << 17;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsXsave)) return false;
  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  if ((a & kTileStates) != kTileStates) return false;
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}
#endif

struct Choice {
  CpuLevel level = CpuLevel::portable;
  std::string error;
};

Choice choose() {
  Choice choice;
  const char* wanted = std::getenv("LLADA_KERNELS_CPU");
  if (wanted == nullptr || *wanted == '\0') {
    for (CpuLevel level : kLevels)
      if (level != CpuLevel::amx_emulated && cpu_supports(level)) choice.level = level;
    return choice;
  }
  std::string names;
  for (CpuLevel level : kLevels) {
    names += std::string(names.empty() ? "" : ", ") + cpu_level_name(level);
    if (std::strcmp(wanted, cpu_level_name(level)) != 0) continue;
    if (cpu_supports(level))
      choice.level = level;
    else
      choice.error = std::string("LLADA_KERNELS_CPU: this machine has no ") + wanted;
    return choice;
  }
  choice.error = "LLADA_KERNELS_CPU: expected one of " + names + ", got " + wanted;
  return choice;
}

const Choice& choice() {
  static const Choice instance = choose();
  return instance;
}

}  // namespace

const char* cpu_level_name(CpuLevel level) {
  switch (level) {
    case CpuLevel::amx_emulated: return "amx_emulated";
    case CpuLevel::amx: return "amx";
    case CpuLevel::avx512_bf16: return "avx512_bf16";
    case CpuLevel::avx512: return "avx512";
    case CpuLevel::avx2: return "avx2";
    case CpuLevel::portable: break;
  }
  return "portable";
}

bool cpu_supports(CpuLevel level) {
#if defined(__x86_64__)
  switch (level) {  // __builtin_cpu_supports also asks the operating system for the wider registers
    case CpuLevel::amx_emulated: return true;
    case CpuLevel::amx: return cpu_supports(CpuLevel::avx512_bf16) && has_amx();
    case CpuLevel::avx512_bf16:
      return cpu_supports(CpuLevel::avx512) && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    case CpuLevel::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
    case CpuLevel::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case CpuLevel::portable: break;
  }
#endif
  return level == CpuLevel::portable;
}

CpuLevel cpu_level() { return choice().level; }

const char* cpu_level_error() { return choice().error.empty() ? nullptr : choice().error.c_str(); }

}  // namespace llada
