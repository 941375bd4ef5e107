#include "common/cpu_level.h"

#include <cstdlib>
#include <cstring>
#include <string>

namespace llada {
namespace {

constexpr CpuLevel kLevels[] = {CpuLevel::portable, CpuLevel::avx2, CpuLevel::avx512, CpuLevel::avx512_bf16};

struct Choice {
  CpuLevel level = CpuLevel::portable;
  std::string error;
};

Choice choose() {
  Choice choice;
  for (CpuLevel level : kLevels)
    if (cpu_supports(level)) choice.level = level;
  const char* wanted = std::getenv("LLADA_KERNELS_CPU");
  if (wanted == nullptr || *wanted == '\0') return choice;
  for (CpuLevel level : kLevels) {
    if (std::strcmp(wanted, cpu_level_name(level)) != 0) continue;
    if (cpu_supports(level))
      choice.level = level;
    else
      choice.error = std::string("LLADA_KERNELS_CPU: this machine has no ") + wanted;
    return choice;
  }
  choice.error = std::string("LLADA_KERNELS_CPU: expected portable, avx2, avx512 or avx512_bf16, got ") + wanted;
  return choice;
}

const Choice& choice() {
  static const Choice instance = choose();
  return instance;
}

}  // namespace

const char* cpu_level_name(CpuLevel level) {
  switch (level) {
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
    case CpuLevel::avx512_bf16: return cpu_supports(CpuLevel::avx512) && __builtin_cpu_supports("avx512bf16");
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
