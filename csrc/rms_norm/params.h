#pragma once

#include "common/cpu_level.h"
#include "common/cuda_kernel.h"

namespace llada {

// t[r] = T(x[r] + residual[r]); y[r] = weight * T(t[r] * rsqrt(mean(t[r]^2) + eps)), rows contiguous.
struct RmsNormParams {
  bool bf16;  // else fp32
  int64_t rows, width;
  float eps;
  const void *x, *weight, *residual;  // [rows, width], [width], [rows, width] or null: t = x
  void *y, *total;                    // [rows, width]; t where there is a residual
  float* rstd;                        // [rows]: 1 / sqrt(mean + eps), saved for the backward
};

struct RmsNormBackwardParams {
  bool bf16;
  int64_t rows, width;
  const void *grad_y, *grad_total, *x, *weight;  // grad_total may be null; x is what was normalised
  const float* rstd;
  void* grad_x;        // of the norm, rounded, plus grad_total
  float* grad_weight;  // [width]; fp32 whatever the dtype
};

// Bytes for CUDA: a gradient of the weight per chunk of 128 rows.
inline int64_t rms_norm_backward_workspace(const RmsNormBackwardParams& p) { return 4 * p.width * ((p.rows + 127) / 128); }

LLADA_DECLARE_CPU_KERNEL(rms_norm, RmsNormParams)
LLADA_DECLARE_CPU_KERNEL(rms_norm_backward, RmsNormBackwardParams)
LLADA_DECLARE_CUDA_KERNEL(rms_norm, RmsNormParams)
LLADA_DECLARE_CUDA_KERNEL(rms_norm_backward, RmsNormBackwardParams)

}  // namespace llada
