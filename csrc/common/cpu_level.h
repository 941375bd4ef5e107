// CPU levels: every kernel file is compiled once per CPU level and the best level that the machine has is chosen at run time.
#pragma once

#include "common/parallel.h"

namespace llada {

// amx_emulated is amx with a scalar stand-in for the tile instructions (common/amx_tile.h), compiled for the baseline: it tests what is
// written for AMX on machines without it. It is never chosen, only forced.
enum class CpuLevel { portable, avx2, avx512, avx512_bf16, amx, amx_emulated };

// The level in use: by cpuid, once per process, or the one that the environment variable LLADA_KERNELS_CPU names.
CpuLevel cpu_level();
const char* cpu_level_name(CpuLevel level);
// Whether this machine can run kernels of `level`. Where it has AMX and `level` is amx, asks the system for the tile registers.
bool cpu_supports(CpuLevel level);
// The error in LLADA_KERNELS_CPU (unknown name, or a level that this machine lacks), or nullptr.
const char* cpu_level_error();

// Declares op(Params, Parallel) for each level and op_cpu(), which calls the one in use. Ops that multiply matrices have kernels of their
// own for AMX (MATRIX_OPS in CMakeLists.txt) and are declared by LLADA_DECLARE_CPU_MATRIX_KERNEL; the others run those of another level.
#define LLADA_DECLARE_CPU_LEVEL(level, op, Params) \
  namespace level {                                \
  void op(const Params&, const Parallel&);         \
  }
#if defined(__x86_64__)
#define LLADA_DECLARE_CPU_KERNELS(op, Params, amx_level, amx_emulated_level)   \
  LLADA_DECLARE_CPU_LEVEL(portable, op, Params)                                \
  LLADA_DECLARE_CPU_LEVEL(avx2, op, Params)                                    \
  LLADA_DECLARE_CPU_LEVEL(avx512, op, Params)                                  \
  LLADA_DECLARE_CPU_LEVEL(avx512_bf16, op, Params)                             \
  LLADA_DECLARE_CPU_LEVEL(amx_level, op, Params)                               \
  LLADA_DECLARE_CPU_LEVEL(amx_emulated_level, op, Params)                      \
  inline void op##_cpu(const Params& p, const Parallel& parallel) {            \
    switch (cpu_level()) {                                                     \
      case CpuLevel::amx: return amx_level::op(p, parallel);                   \
      case CpuLevel::amx_emulated: return amx_emulated_level::op(p, parallel); \
      case CpuLevel::avx512_bf16: return avx512_bf16::op(p, parallel);         \
      case CpuLevel::avx512: return avx512::op(p, parallel);                   \
      case CpuLevel::avx2: return avx2::op(p, parallel);                       \
      case CpuLevel::portable: return portable::op(p, parallel);               \
    }                                                                          \
  }
#define LLADA_DECLARE_CPU_KERNEL(op, Params) LLADA_DECLARE_CPU_KERNELS(op, Params, avx512_bf16, portable)
#define LLADA_DECLARE_CPU_MATRIX_KERNEL(op, Params) LLADA_DECLARE_CPU_KERNELS(op, Params, amx, amx_emulated)
#else
#define LLADA_DECLARE_CPU_KERNEL(op, Params)    \
  LLADA_DECLARE_CPU_LEVEL(portable, op, Params) \
  inline void op##_cpu(const Params& p, const Parallel& parallel) { portable::op(p, parallel); }
#define LLADA_DECLARE_CPU_MATRIX_KERNEL(op, Params) LLADA_DECLARE_CPU_KERNEL(op, Params)
#endif

// The level whose kernels serve LLADA_CPU_LEVEL where no matrices are multiplied.
#if defined(LLADA_CPU_LEVEL_amx)
#define LLADA_VECTOR_LEVEL avx512_bf16
#elif defined(LLADA_CPU_LEVEL_amx_emulated)
#define LLADA_VECTOR_LEVEL portable
#else
#define LLADA_VECTOR_LEVEL LLADA_CPU_LEVEL
#endif

}  // namespace llada
