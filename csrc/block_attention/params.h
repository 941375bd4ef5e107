#pragma once

#include "common/cpu_level.h"

namespace llada {

// Keys per tile of the key-stationary half of a plan: the width of the transposed K and V blocks.
constexpr int64_t kAttentionKeyBlock = 64;

// Attention under a mask of two key intervals per query, walked by the tiles of its plan (llada_kernels/_tile_plan.py). All contiguous.
struct BlockAttentionParams {
  bool bf16;  // else fp32
  int64_t num_queries, num_keys, heads, kv_heads, head_dim;
  float scale;
  const void *q, *k, *v;         // [num_queries, heads, head_dim], 2 x [num_keys, kv_heads, head_dim]
  const int32_t *context, *own;  // [num_queries, 2]: half-open key intervals
  const int32_t *tiles, *order;  // [num_tiles, 7], [num_tiles]
  int64_t num_tiles, max_tile_queries;
  const int32_t *key_offsets, *key_runs, *key_order;  // per kAttentionKeyBlock keys; used by the backward
  int64_t num_key_blocks;
  void* out;   // [num_queries, heads, head_dim]; const in the backward
  float* lse;  // [num_queries, heads]: log of the sum of exp(scale * q k), -inf where a query sees no key; const in the backward
};

struct BlockAttentionBackwardParams {
  BlockAttentionParams forward;
  const void* grad_out;
  void *grad_q, *grad_k, *grad_v;
};

LLADA_DECLARE_CPU_MATRIX_KERNEL(block_attention, BlockAttentionParams)
LLADA_DECLARE_CPU_MATRIX_KERNEL(block_attention_backward, BlockAttentionBackwardParams)

}  // namespace llada
