#pragma once

#include "common/cpu_level.h"

namespace llada {

// y[r][i] = T(silu(gate[r][i])) * up[r][i]; a row of gate_up holds gate, then up.
struct SwigluParams {
  bool bf16;  // else fp32
  int64_t rows, width;
  const void* gate_up;  // [rows, 2 * width]
  void* y;              // [rows, width]
};

struct SwigluBackwardParams {
  bool bf16;
  int64_t rows, width;
  const void *grad_y, *gate_up;
  void* grad_gate_up;
};

LLADA_DECLARE_CPU_KERNEL(swiglu, SwigluParams)
LLADA_DECLARE_CPU_KERNEL(swiglu_backward, SwigluBackwardParams)

}  // namespace llada
