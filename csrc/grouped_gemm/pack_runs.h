// Packing of weights against their order in memory, for products with their transpose. Included after the standard headers.
#pragma once

#include "common/packed_gemm.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

// pack() of B(k, n) = b[n + k * k_stride] for whole panels, row by row of B: a panel at a time takes one line of 64 bytes of every row,
// which are pages apart, and waits for each.
template <class T>
__attribute__((noinline)) void pack_runs(uint32_t* packed, const T* b, int64_t k_stride, int64_t n, int64_t k) {
  constexpr int64_t kDepth = kPackedDepth<T>, kAheadRows = 16;
  const int64_t depth = (k + kDepth - 1) / kDepth, whole = k / kDepth;
  for (int64_t i = 0; i < depth; ++i) {
    const T* row = b + i * kDepth * k_stride;
    uint32_t* out = packed + i * kPanel;
    for (int64_t j = 0; j < n; j += kPanel, out += depth * kPanel) {
      __builtin_prefetch(row + j + kAheadRows * k_stride);
      if constexpr (kDepth == 2) __builtin_prefetch(row + j + (kAheadRows + 1) * k_stride);
      if (i == whole) {  // the last of an odd k alone
        for (int64_t c = 0; c < kPanel; ++c) out[c] = packed_element(b + j + c, k_stride, i, k);
        continue;
      }
#pragma GCC unroll 4
      for (int half = 0; half < kPanel; half += kLanes) {
        VecU v;
        if constexpr (kDepth == 2) {
          VecH low, high;
          std::memcpy(&low, row + j + half, sizeof low);
          std::memcpy(&high, row + j + half + k_stride, sizeof high);
          v = __builtin_convertvector(low, VecU) | __builtin_convertvector(high, VecU) << 16;
        } else {
          v = (VecU)load(row + j + half);
        }
        std::memcpy(out + half, &v, sizeof v);
      }
    }
  }
}

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
