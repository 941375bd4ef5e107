// CPU levels: every kernel file is compiled once per level and the best level that the machine has is chosen at run time.
#pragma once

#include "common/parallel.h"

namespace llada {

enum class CpuLevel { portable, avx2, avx512, avx512_bf16 };

// The level in use: by cpuid, once per process, or the one that the environment variable LLADA_KERNELS_CPU names.
CpuLevel cpu_level();
const char* cpu_level_name(CpuLevel level);
// Whether this machine can run kernels of `level`.
bool cpu_supports(CpuLevel level);
// The error in LLADA_KERNELS_CPU (unknown name, or a level that this machine lacks), or nullptr.
const char* cpu_level_error();

// Declares op(Params, Parallel) for each level and op_cpu(), which calls the one in use.
#if defined(__x86_64__)
#define LLADA_DECLARE_CPU_KERNEL(op, Params)                           \
  namespace portable {                                                 \
  void op(const Params&, const Parallel&);                             \
  }                                                                    \
  namespace avx2 {                                                     \
  void op(const Params&, const Parallel&);                             \
  }                                                                    \
  namespace avx512 {                                                   \
  void op(const Params&, const Parallel&);                             \
  }                                                                    \
  namespace avx512_bf16 {                                              \
  void op(const Params&, const Parallel&);                             \
  }                                                                    \
  inline void op##_cpu(const Params& p, const Parallel& parallel) {    \
    switch (cpu_level()) {                                             \
      case CpuLevel::avx512_bf16: return avx512_bf16::op(p, parallel); \
      case CpuLevel::avx512: return avx512::op(p, parallel);           \
      case CpuLevel::avx2: return avx2::op(p, parallel);               \
      case CpuLevel::portable: return portable::op(p, parallel);       \
    }                                                                  \
  }
#else
#define LLADA_DECLARE_CPU_KERNEL(op, Params) \
  namespace portable {                       \
  void op(const Params&, const Parallel&);   \
  }                                          \
  inline void op##_cpu(const Params& p, const Parallel& parallel) { portable::op(p, parallel); }
#endif

}  // namespace llada
