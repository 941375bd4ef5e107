#pragma once

#include "common/cpu_level.h"
#include "common/cuda_kernel.h"

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

// CUDA keeps the scores of 8 tokens, experts + n_group floats each, in shared memory.
constexpr int64_t kRoutingSharedBytes = 47 * 1024;
inline bool moe_routing_fits_cuda(const MoeRoutingParams& p) { return 8 * 4 * (p.experts + p.n_group) <= kRoutingSharedBytes; }
// Bytes: counts of at most 256 chunks of tokens; with a block pool a float per token and expert and a byte per block and expert.
inline int64_t moe_routing_workspace(const MoeRoutingParams& p) {
  return 4 * 256 * p.experts + (p.block_size > 0 ? 4 * p.tokens * p.experts + p.tokens / p.block_size * p.experts : 0);
}

LLADA_DECLARE_CPU_KERNEL(moe_routing, MoeRoutingParams)
LLADA_DECLARE_CPU_KERNEL(moe_routing_backward, MoeRoutingBackwardParams)
LLADA_DECLARE_FP32_CUDA_KERNEL(moe_routing, MoeRoutingParams)
LLADA_DECLARE_FP32_CUDA_KERNEL(moe_routing_backward, MoeRoutingBackwardParams)

}  // namespace llada
