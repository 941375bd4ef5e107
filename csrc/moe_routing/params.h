#pragma once

#include "common/cpu_level.h"

namespace llada {

// Choice of top_k of `experts` for each token and the stable sort of the choices by expert. See llada_kernels/ops/moe_routing.
struct MoeRoutingParams {
  int64_t tokens, experts, top_k, n_group, topk_group;
  int64_t block_size, capacity;  // block_size 0: no block pool
  bool softmax, normalize;
  float scale;
  const float* logits;       // [tokens, experts]
  const float* expert_bias;  // [experts] or nullptr
  int32_t* topk_ids;         // [tokens, top_k]
  float* topk_weights;       // [tokens, top_k]
  int32_t* offsets;          // [experts + 1]
  int32_t* permutation;      // [tokens * top_k]
};

struct MoeRoutingBackwardParams {
  int64_t tokens, experts, top_k;
  bool softmax, normalize;
  float scale;
  const float *grad_weights, *logits;
  const int32_t* topk_ids;
  float* grad_logits;
};

LLADA_DECLARE_CPU_KERNEL(moe_routing, MoeRoutingParams)
LLADA_DECLARE_CPU_KERNEL(moe_routing_backward, MoeRoutingBackwardParams)

}  // namespace llada
