// Single-thread matrix products on tiles, fp32 accumulation, operands fp32 or bf16 used as they lie in memory (no packing).
// The caller blocks for the caches and threads. The order of summation depends on the sizes only, so results are repeatable.
//
//   gemm_nt: C[m][n] (+)= sum_k A[m][k] * B[n][k]   both contiguous in k: weights [N, K]. Best for k >= 256.
//   gemm_nn: C[m][n] (+)= sum_k A(m, k) * B[k][n]   B contiguous in n; A with any two strides, so A^T * B (weight gradients) as well.
#pragma once

#include "common/simd.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

#if defined(LLADA_CPU_LEVEL_avx512)
constexpr int kDotRows = 4, kDotColumns = 4;  // 16 accumulators + 8 operands of 32 registers
constexpr int kOuterRows = 12;                // x 2 vectors: 24 accumulators + 2 + 1
#else
constexpr int kDotRows = 3, kDotColumns = 3;  // 9 + 6 of 16 registers
constexpr int kOuterRows = 6;                 // x 2 vectors: 12 + 2 + 1
#endif

// Elements of k that one step of the dot form multiplies: pairs of bf16 where the level can.
template <class TA, class TB>
constexpr int64_t kDotStep = kPackedDepth<TA> == 2 && kPackedDepth<TB> == 2 ? 2 * kLanes : kLanes;

template <int M, int N, class TA, class TB>
inline void dot_tile(const TA* a, int64_t lda, const TB* b, int64_t ldb, int64_t k, float* c, int64_t ldc, bool accumulate) {
  constexpr int64_t step = kDotStep<TA, TB>;
  Vec acc[M][N] = {};
  const int64_t main = k / step * step;
  for (int64_t i = 0; i < main; i += step) {
    if constexpr (step == kLanes) {
      Vec bv[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) bv[n] = load(b + n * ldb + i);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Vec av = load(a + m * lda + i);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[m][n] += av * bv[n];
      }
    } else {
      VecU bv[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) bv[n] = load_packed(b + n * ldb + i);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const VecU av = load_packed(a + m * lda + i);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[m][n] = multiply_add_pairs(acc[m][n], av, bv[n]);
      }
    }
  }
  for (int64_t i = main; i < k; i += kLanes) {
    const int64_t left = k - i < kLanes ? k - i : kLanes;
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] += load_partial(a + m * lda + i, left) * load_partial(b + n * ldb + i, left);
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const float sum = reduce_add(acc[m][n]);
      c[m * ldc + n] = accumulate ? c[m * ldc + n] + sum : sum;
    }
}

template <int N, class TA, class TB>
inline void dot_rows(const TA* a, int64_t lda, int64_t m, const TB* b, int64_t ldb, int64_t k, float* c, int64_t ldc, bool accumulate) {
  int64_t i = 0;
  for (; i + kDotRows <= m; i += kDotRows) dot_tile<kDotRows, N>(a + i * lda, lda, b, ldb, k, c + i * ldc, ldc, accumulate);
  for (; i + 2 <= m; i += 2) dot_tile<2, N>(a + i * lda, lda, b, ldb, k, c + i * ldc, ldc, accumulate);
  for (; i < m; ++i) dot_tile<1, N>(a + i * lda, lda, b, ldb, k, c + i * ldc, ldc, accumulate);
}

template <class TA, class TB>
__attribute__((noinline)) void gemm_nt(const TA* a, int64_t lda, const TB* b, int64_t ldb, int64_t m, int64_t n, int64_t k, float* c,
                                       int64_t ldc, bool accumulate = false) {
  int64_t j = 0;
  for (; j + kDotColumns <= n; j += kDotColumns) dot_rows<kDotColumns>(a, lda, m, b + j * ldb, ldb, k, c + j, ldc, accumulate);
  for (; j < n; ++j) dot_rows<1>(a, lda, m, b + j * ldb, ldb, k, c + j, ldc, accumulate);
}

// M rows x (N vectors or, where N == 0, the last `tail` < kLanes columns).
template <int M, int N, class TA, class TB>
inline void outer_tile(const TA* a, int64_t a_row, int64_t a_k, const TB* b, int64_t ldb, int64_t k, float* c, int64_t ldc, bool accumulate,
                       int64_t tail) {
  constexpr int kVectors = N == 0 ? 1 : N;
  Vec acc[M][kVectors] = {};
  for (int64_t i = 0; i < k; ++i) {
    Vec bv[kVectors];
    if constexpr (N == 0) {
      bv[0] = load_partial(b + i * ldb, tail);
    } else {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) bv[n] = load(b + i * ldb + n * kLanes);
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const float x = to_float(a[m * a_row + i * a_k]);
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) acc[m][n] += x * bv[n];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < kVectors; ++n) {
      float* out = c + m * ldc + n * kLanes;
      if constexpr (N == 0)
        store_partial(out, accumulate ? load_partial(out, tail) + acc[m][n] : acc[m][n], tail);
      else
        store(out, accumulate ? load(out) + acc[m][n] : acc[m][n]);
    }
}

template <int M, class TA, class TB>
inline void outer_columns(const TA* a, int64_t a_row, int64_t a_k, const TB* b, int64_t ldb, int64_t n, int64_t k, float* c, int64_t ldc,
                          bool accumulate) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) outer_tile<M, 2>(a, a_row, a_k, b + j, ldb, k, c + j, ldc, accumulate, 0);
  for (; j + kLanes <= n; j += kLanes) outer_tile<M, 1>(a, a_row, a_k, b + j, ldb, k, c + j, ldc, accumulate, 0);
  if (j < n) outer_tile<M, 0>(a, a_row, a_k, b + j, ldb, k, c + j, ldc, accumulate, n - j);
}

// A(m, k) = a[m * a_row + k * a_k]: a_k = 1 for a row-major A, a_row = 1 for its transpose.
template <class TA, class TB>
__attribute__((noinline)) void gemm_nn(const TA* a, int64_t a_row, int64_t a_k, const TB* b, int64_t ldb, int64_t m, int64_t n, int64_t k,
                                       float* c, int64_t ldc, bool accumulate = false) {
  int64_t i = 0;
  for (; i + kOuterRows <= m; i += kOuterRows)
    outer_columns<kOuterRows>(a + i * a_row, a_row, a_k, b, ldb, n, k, c + i * ldc, ldc, accumulate);
  for (; i + 4 <= m; i += 4) outer_columns<4>(a + i * a_row, a_row, a_k, b, ldb, n, k, c + i * ldc, ldc, accumulate);
  for (; i < m; ++i) outer_columns<1>(a + i * a_row, a_row, a_k, b, ldb, n, k, c + i * ldc, ldc, accumulate);
}

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
