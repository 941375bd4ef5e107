// Products of very few rows with weights that come from memory: what a step of decoding spends its time on. Included after the standard
// headers.
#pragma once

#include "moe_mlp/params.h"

#include "moe_mlp/expert_rows.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

// Up to this many rows, weights are read one row after the other, in the order of memory. Reading four rows side by side is shorter in
// instructions (an operand serves four products), but one thread read 30 GB/s so and 35 as here: memory is fetched ahead per stream, and
// each of four streams ends with its page, which is a row of 2048 bf16.
#if defined(LLADA_CPU_LEVEL_avx512)
constexpr int64_t kFewRows = 6;  // x 4 partial sums: 24 of 32 registers
#else
constexpr int64_t kFewRows = 3;  // 12 of 16
#endif
constexpr int kPartialSums = 4;
constexpr int64_t kAheadBytes = 4096;

// Each weight is used once: fetched past the second cache, it drives nothing out of it, and is not written to the third.
inline void fetch_once(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + kAheadBytes, 0, 0); }

// Rows of weights: take(i) is the operand at column i of the current one, next() goes to the next row.
template <class T>
struct PlainRows {
  const T* row;
  int64_t k;

  void next() { row += k; }
  VecU take(int64_t i) const {
    fetch_once(row + i);
    if constexpr (kDotStep<T, T> == kLanes)
      return (VecU)load(row + i);
    else
      return load_packed(row + i);
  }
};

#if defined(LLADA_CPU_LEVEL_avx512_bf16)
// The same for quantised weights, which are dequantised in registers, to the bits of dequantize().
template <class Q>
struct QuantizedRows {
  const Q* row;
  const bf16* scales;
  int64_t k;
  int shift;  // log2 of the group

  void next() {
    row += k / kQuantum * kQuantumBytes<Q>;
    scales += k >> shift;
  }
  VecU take(int64_t i) const {
    const Q* q = row + i / kQuantum * kQuantumBytes<Q>;
    fetch_once(q);
    const Vec scale = splat(to_float(scales[i >> shift]));
    Vec low, high;
    if constexpr (std::is_same_v<Q, int8_t>) {
      Vec v[2];
      load_quantized(q, v);
      low = v[0] * scale, high = v[1] * scale;
    } else {  // the 16 values that a group has, looked up by the lowest 4 bits of each lane
      const Vec values = Vec{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7} * scale;
      const VecI both = widen(q);
      low = (Vec)_mm512_permutexvar_ps((__m512i)both, (__m512)values);
      high = (Vec)_mm512_permutexvar_ps((__m512i)(both >> 4), (__m512)values);
    }
    return (VecU)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  }
};
#endif

// Lane l becomes the sum of the lanes of v[l].
inline Vec sums_of_lanes(Vec (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int bit = 1; bit < kLanes; bit *= 2) {
    VecI first, second;  // lanes without the bit come from the first vector, those with it from the second
    for (int l = 0; l < kLanes; ++l) {
      first[l] = (l & ~bit) + (l & bit ? kLanes : 0);
      second[l] = (l | bit) + (l & bit ? kLanes : 0);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2 * bit)
      v[i] = __builtin_shuffle(v[i], v[i + bit], first) + __builtin_shuffle(v[i], v[i + bit], second);
  }
  return v[0];
}

template <int M, class T, class Rows>
inline void few_rows(const T* a, int64_t k, Rows weights, int64_t n, float* c, int64_t ldc) {
  constexpr int64_t step = kDotStep<T, T>;
  const auto add = [&](Vec(&acc)[M][kPartialSums], int part, int64_t i) {
    const VecU w = weights.take(i);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      if constexpr (step == kLanes)
        acc[m][part] += load(a + m * k + i) * (Vec)w;
      else
        acc[m][part] = multiply_add_pairs(acc[m][part], load_packed(a + m * k + i), w);
    }
  };
  Vec sums[M][kLanes] = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t columns = least(kLanes, n - j);
    for (int64_t r = 0; r < columns; ++r, weights.next()) {
      Vec acc[M][kPartialSums] = {};
      int64_t i = 0;
      for (; i + kPartialSums * step <= k; i += kPartialSums * step) {
#pragma GCC unroll 4
        for (int part = 0; part < kPartialSums; ++part) add(acc, part, i + part * step);
      }
      for (; i < k; i += step) add(acc, 0, i);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sums[m][r] = (acc[m][0] + acc[m][1]) + (acc[m][2] + acc[m][3]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Vec lanes[kLanes];
      std::memcpy(lanes, sums[m], sizeof lanes);
      const Vec sum = sums_of_lanes(lanes);
      if (columns == kLanes)
        store(c + m * ldc + j, sum);
      else
        store_partial(c + m * ldc + j, sum, columns);
    }
  }
}

template <int M, class T, class Rows>
inline void few_rows_of(int64_t m, const T* a, int64_t k, const Rows& weights, int64_t n, float* c, int64_t ldc) {
  if (m == M) return few_rows<M>(a, k, weights, n, c, ldc);
  if constexpr (M > 1) few_rows_of<M - 1>(m, a, k, weights, n, c, ldc);
}

template <class T, class Rows>
__attribute__((noinline)) void gemm_few_rows(const T* a, int64_t m, int64_t k, const Rows& weights, int64_t n, float* c, int64_t ldc) {
  few_rows_of<kFewRows>(m, a, k, weights, n, c, ldc);
}

// C[m][n] = A[m][k] * rows [first, first + n) of an expert, where packing does not pay; `buffer` as of expert_rows. The bits do not
// depend on whether the weights are quantised.
template <class T>
inline void gemm_few(const ExpertWeights& w, int64_t expert, int64_t rows, int64_t k, int64_t first, int64_t n, const T* a, int64_t m,
                     float* c, int64_t ldc, T* buffer) {
  const bool few = m <= kFewRows && k % kDotStep<T, T> == 0;
#if defined(LLADA_CPU_LEVEL_avx512_bf16)
  if constexpr (kPackedDepth<T> == 2) {
    if (few && w.kind != ExpertWeights::Kind::plain && (w.group & (w.group - 1)) == 0) {
      const int64_t begin = (expert * rows + first) * k;
      const bf16* scales = static_cast<const bf16*>(w.scales) + begin / w.group;
      const int shift = __builtin_ctzll(uint64_t(w.group));
      if (w.kind == ExpertWeights::Kind::int8)
        gemm_few_rows(a, m, k, QuantizedRows<int8_t>{static_cast<const int8_t*>(w.data) + begin, scales, k, shift}, n, c, ldc);
      else
        gemm_few_rows(a, m, k, QuantizedRows<uint8_t>{static_cast<const uint8_t*>(w.data) + begin / 2, scales, k, shift}, n, c, ldc);
      return;
    }
  }
#endif
  const T* b = expert_rows(w, expert, rows, k, first, n, buffer);
  if (few)
    gemm_few_rows(a, m, k, PlainRows<T>{b, k}, n, c, ldc);
  else
    gemm_stream(a, k, m, b, n, k, c, ldc);
}

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
