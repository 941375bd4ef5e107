#pragma once

#include "common/cpu_level.h"

namespace llada {

// The weights of all experts, [experts, rows, columns]: in the dtype of the activations, or quantised, with a bf16 scale for every
// `group` columns of a row. int4: 16 bytes hold 32 columns, byte j column j in its low and 16 + j in its high half, plus 8 each.
struct ExpertWeights {
  enum class Kind { plain, int8, int4 };
  Kind kind = Kind::plain;
  const void* data = nullptr;
  const void* scales = nullptr;  // bf16 [experts, rows, columns / group]
  int64_t group = 0;
};

// The routed experts of a MoE layer. Row r of the sorted rows is slot permutation[r], of token permutation[r] / top_k.
struct MoeMlpParams {
  bool bf16;  // else fp32
  int64_t tokens, top_k, experts, hidden, width;
  const void* x;                    // [tokens, hidden]
  const float* weights;             // [tokens, top_k]
  const int32_t* offsets;           // [experts + 1]
  const int32_t* permutation;       // [tokens * top_k]
  ExpertWeights w_gate_up, w_down;  // [experts, 2 * width, hidden], [experts, hidden, width]
  void* out;                        // [tokens, hidden]
  void* pre_activation;             // [tokens * top_k, 2 * width] sorted rows, or nullptr
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

LLADA_DECLARE_CPU_MATRIX_KERNEL(moe_mlp, MoeMlpParams)
LLADA_DECLARE_CPU_MATRIX_KERNEL(moe_mlp_backward, MoeMlpBackwardParams)

}  // namespace llada
