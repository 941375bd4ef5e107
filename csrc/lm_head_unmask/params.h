#pragma once

#include "threshold_unmask/params.h"

namespace llada {

// threshold_unmask on the logits hidden * lm_head^T, rounded to the dtype of both; they exist part by part only.
struct LmHeadUnmaskParams {
  ThresholdUnmaskParams rules;   // logits and temperature: null
  const void *hidden, *lm_head;  // [rows * length, width], [vocab, width]
  int64_t width;
};

LLADA_DECLARE_CPU_MATRIX_KERNEL(lm_head_unmask, LmHeadUnmaskParams)

}  // namespace llada
