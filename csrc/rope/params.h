#pragma once

#include "common/cpu_level.h"

namespace llada {

// y = x * cos + rotate_half(x) * sin on the first `rotary` dims, y = x on the others; products and sums rounded to the dtype.
// `transposed` applies the transposed matrix of that map: with x the gradient of y, y is the gradient of x.
struct RopeParams {
  bool bf16;  // else fp32
  bool transposed;
  int64_t tokens, heads, dim, rotary;
  const void *x, *cos, *sin;  // [tokens, heads, dim], [tokens, rotary] twice
  void* y;                    // [tokens, heads, dim]
};

LLADA_DECLARE_CPU_KERNEL(rope, RopeParams)

}  // namespace llada
