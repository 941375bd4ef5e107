#pragma once

#include "common/cpu_level.h"
#include "common/cuda_kernel.h"

namespace llada {

// The arithmetic is described in llada_kernels/ops/threshold_unmask/reference.py; results are bitwise those of the reference.
struct ThresholdUnmaskParams {
  bool bf16;  // else fp32
  int64_t rows, length, vocab, mask_token_id;
  const void* logits;              // [rows, length, vocab]
  const int64_t* tokens;           // [rows, length]
  const float* threshold;          // [rows]
  const float* editing_threshold;  // [rows] or null; below 0: off
  const int64_t* min_unmask;       // [rows]
  const double* temperature;       // [rows] or null: 0 everywhere
  const int64_t* top_k;            // [rows] or null; 0: off
  const double* top_p;             // [rows] or null; 1: off
  const int64_t* seed;             // [rows], read where temperature is given
  const bool* editable;            // [rows, length] or null: all
  const int64_t* positions;        // [rows, length] or null: 0 .. length - 1
  const int64_t* forward_index;    // [rows], read where temperature is given
  int64_t* new_tokens;             // [rows, length]
  float* confidence;               // [rows, length]
  int32_t* counts;                 // [rows, 2]
  char* bad;                       // [rows, length]: 0, or 'n' NaN, 'i' +inf, 'e' nothing finite besides the mask token
};

// Bytes: 3 floats per part of 1024 ids, a float and a char per position.
inline int64_t threshold_unmask_workspace(const ThresholdUnmaskParams& p) { return p.rows * p.length * ((p.vocab + 1023) / 1024 * 12 + 5); }

LLADA_DECLARE_CPU_KERNEL(threshold_unmask, ThresholdUnmaskParams)
LLADA_DECLARE_CUDA_KERNEL(threshold_unmask, ThresholdUnmaskParams)

}  // namespace llada
