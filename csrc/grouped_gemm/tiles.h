// Tile products of grouped_gemm and moe_mlp on top of common/gemm.h, and their tile sizes. Included after the standard headers.
#pragma once

#include "common/gemm.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

constexpr int64_t kBlockRows = 256;  // rows of one work item, at most
constexpr int64_t kStepRows = 32;    // rows whose operands are used while they are in the nearest cache
constexpr int64_t kTile = 64;        // columns of one work item
constexpr int64_t kDepth = 256;      // terms of a sum between two visits of the accumulators in memory

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// rows x columns floats to T.
template <class T>
inline void store_tile(const float* tile, int64_t ld, int64_t rows, int64_t columns, T* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) store(out + r * ldo + i, load(tile + r * ld + i));
    for (; i < columns; ++i) out[r * ldo + i] = from_float<T>(tile[r * ld + i]);
  }
}

template <class T>
inline void widen_row(const T* row, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(row + i));
  for (; i < n; ++i) out[i] = to_float(row[i]);
}

// C[m][n] (+)= sum_k A(m, k) * B[k][n] as gemm_nn, in steps of kDepth so that the used part of B stays in a near cache.
template <class T>
inline void product_nn(const float* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t m, int64_t n, int64_t k, float* c,
                       int64_t ldc, bool accumulate) {
  if (k == 0 && !accumulate) gemm_nn(a, a_row, a_k, b, ldb, m, n, 0, c, ldc, false);
  for (int64_t k0 = 0; k0 < k; k0 += kDepth)
    gemm_nn(a + k0 * a_k, a_row, a_k, b + k0 * ldb, ldb, m, n, least(kDepth, k - k0), c, ldc, accumulate || k0 > 0);
}

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
