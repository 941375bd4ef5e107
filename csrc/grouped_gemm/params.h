#pragma once

#include "common/cpu_level.h"

namespace llada {

// out[r] = a[r] @ b[e]^T for the rows r in [offsets[e], offsets[e + 1]) of every group e.
struct GroupedGemmParams {
  bool bf16;  // else fp32
  int64_t rows, groups, n, k;
  const void *a, *b;       // [rows, k], [groups, n, k]
  const int32_t* offsets;  // [groups + 1]
  void* out;               // [rows, n]
};

struct GroupedGemmBackwardParams {
  bool bf16;
  int64_t rows, groups, n, k;
  const void *grad, *a, *b;
  const int32_t* offsets;
  void *grad_a, *grad_b;  // nullptr: not wanted
};

LLADA_DECLARE_CPU_MATRIX_KERNEL(grouped_gemm, GroupedGemmParams)
LLADA_DECLARE_CPU_MATRIX_KERNEL(grouped_gemm_backward, GroupedGemmBackwardParams)

}  // namespace llada
