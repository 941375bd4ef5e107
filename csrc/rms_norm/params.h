#pragma once

#include "common/cpu_level.h"

namespace llada {

// y[r] = weight * T(x[r] * rsqrt(mean(x[r]^2) + eps)), rows contiguous.
struct RmsNormParams {
  bool bf16;  // else fp32
  int64_t rows, width;
  float eps;
  const void *x, *weight;  // [rows, width], [width]
  void* y;                 // [rows, width]
  float* rstd;             // [rows]: 1 / sqrt(mean + eps), saved for the backward
};

struct RmsNormBackwardParams {
  bool bf16;
  int64_t rows, width;
  const void *grad_y, *x, *weight;
  const float* rstd;
  void* grad_x;
  float* grad_weight;  // [width]; fp32 whatever the dtype
};

LLADA_DECLARE_CPU_KERNEL(rms_norm, RmsNormParams)
LLADA_DECLARE_CPU_KERNEL(rms_norm_backward, RmsNormBackwardParams)

}  // namespace llada
