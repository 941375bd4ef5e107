#pragma once

#include "common/cpu_level.h"
#include "common/cuda_kernel.h"

namespace llada {

// Heads that turn: [tokens, heads, dim], heads and dims contiguous, `stride` elements from token to token. With `weight`, each head is
// normed first, as in rms_norm.
struct RopeHeads {
  int64_t tokens, heads, stride;
  const void* x;       // forward: the input; backward: the gradient
  void* y;             // [tokens, heads, dim] contiguous: the output, or the gradient of the input
  const void* weight;  // [dim] or null
  float* rstd;         // [tokens, heads] with a weight: written by the forward, read by the backward
  // Backward with a weight only:
  int64_t input_stride;
  const void* input;   // what was normed, as x of the forward
  float* grad_weight;  // [dim]; fp32 whatever the dtype
};

// y = x * cos + rotate_half(x) * sin on the first `rotary` dims, y = x on the others; products and sums rounded to the dtype.
// `transposed` applies the transposed matrix of that map, then the gradient of the norm: y becomes the gradient of the input.
struct RopeParams {
  bool bf16;  // else fp32
  bool transposed;
  int64_t dim, rotary;
  float eps;
  const void *cos, *sin;  // [at least the tokens, rotary]
  RopeHeads q, k;         // k.tokens is 0 without k
};

// Bytes for CUDA: with norms the backward keeps a gradient of the weight per chunk of 128 heads.
inline int64_t rope_workspace(const RopeParams& p) {
  if (!p.transposed || p.q.weight == nullptr) return 0;
  return 4 * p.dim * ((p.q.tokens * p.q.heads + 127) / 128 + (p.k.tokens * p.k.heads + 127) / 128);
}

LLADA_DECLARE_CPU_KERNEL(rope, RopeParams)
LLADA_DECLARE_CUDA_KERNEL(rope, RopeParams)

}  // namespace llada
