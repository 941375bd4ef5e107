#pragma once

#include "common/cpu_level.h"

namespace llada {

// The routed experts of a MoE layer. Row r of the sorted rows is slot permutation[r], of token permutation[r] / top_k.
struct MoeMlpParams {
  bool bf16;  // else fp32
  int64_t tokens, top_k, experts, hidden, width;
  const void* x;                   // [tokens, hidden]
  const float* weights;            // [tokens, top_k]
  const int32_t* offsets;          // [experts + 1]
  const int32_t* permutation;      // [tokens * top_k]
  const void *w_gate_up, *w_down;  // [experts, 2 * width, hidden], [experts, hidden, width]
  void* out;                       // [tokens, hidden]
  void* pre_activation;            // [tokens * top_k, 2 * width] sorted rows, or nullptr
};

struct MoeMlpBackwardParams {
  bool bf16;
  int64_t tokens, top_k, experts, hidden, width;
  const void *grad_out, *x;
  const float* weights;
  const int32_t *offsets, *permutation;
  const void *w_gate_up, *w_down, *pre_activation;
  float* grad_weights;
  void *grad_x, *grad_w_gate_up, *grad_w_down;  // nullptr: not wanted
};

LLADA_DECLARE_CPU_KERNEL(moe_mlp, MoeMlpParams)
LLADA_DECLARE_CPU_KERNEL(moe_mlp_backward, MoeMlpBackwardParams)

}  // namespace llada
