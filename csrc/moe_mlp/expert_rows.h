// Rows of experts' weights as T, whether they lie in memory so or quantised. Included after the standard headers.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "moe_mlp/params.h"

#include "grouped_gemm/tiles.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

constexpr int64_t kQuantum = 32;       // a group is a multiple of this
constexpr int64_t kFetchBytes = 4096;  // how far ahead of the dequantisation memory is asked for

// kLanes bytes to integers. GCC 12 converts vectors of bytes one by one, hence the instructions by name.
inline VecI widen(const int8_t* p) {
#if defined(LLADA_CPU_LEVEL_avx512)
  return (VecI)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(LLADA_CPU_LEVEL_avx2)
  return (VecI)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  VecI v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}
inline VecI widen(const uint8_t* p) {
#if defined(LLADA_CPU_LEVEL_avx512)
  return (VecI)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(LLADA_CPU_LEVEL_avx2)
  return (VecI)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  VecI v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

// 32 values of quantised weights as floats.
inline void load_quantized(const int8_t* p, Vec (&q)[kQuantum / kLanes]) {
#pragma GCC unroll 8
  for (int i = 0; i < kQuantum / kLanes; ++i) q[i] = __builtin_convertvector(widen(p + i * kLanes), Vec);
}
inline void load_quantized(const uint8_t* p, Vec (&q)[kQuantum / kLanes]) {
  constexpr int kHalf = kQuantum / kLanes / 2;
#pragma GCC unroll 4
  for (int i = 0; i < kHalf; ++i) {
    const VecI both = widen(p + i * kLanes);
    q[i] = __builtin_convertvector((both & 15) - 8, Vec);
    q[kHalf + i] = __builtin_convertvector((both >> 4) - 8, Vec);
  }
}

template <class T>
inline void store_32(T* p, const Vec (&v)[kQuantum / kLanes]) {
#pragma GCC unroll 4
  for (int i = 0; i < kQuantum / kLanes; i += 2) store_both(p + i * kLanes, v[i], v[i + 1]);
}

template <class Q>
constexpr int64_t kQuantumBytes = std::is_same_v<Q, int8_t> ? kQuantum : kQuantum / 2;

// n rows of k values, every `group` of which have a scale. A product of an integer of 8 bits and a bf16 is exact in fp32: rounded once,
// to T.
template <class T, class Q>
__attribute__((noinline)) void dequantize(const Q* q, const bf16* scales, int64_t n, int64_t k, int64_t group, T* out) {
  for (int64_t i = 0; i < n * k; i += group, ++scales) {
    const Vec scale = splat(to_float(*scales));
    for (int64_t j = 0; j < group; j += kQuantum, q += kQuantumBytes<Q>, out += kQuantum) {
      Vec v[kQuantum / kLanes];
      __builtin_prefetch(q + kFetchBytes);
      load_quantized(q, v);
#pragma GCC unroll 8
      for (int l = 0; l < kQuantum / kLanes; ++l) v[l] = v[l] * scale;
      store_32(out, v);
    }
  }
}

// Rows [first, first + n) of the `rows` rows of k columns that an expert has: where they lie, or dequantised in `buffer` (n * k).
template <class T>
inline const T* expert_rows(const ExpertWeights& w, int64_t expert, int64_t rows, int64_t k, int64_t first, int64_t n, T* buffer) {
  const int64_t begin = (expert * rows + first) * k;
  if (w.kind == ExpertWeights::Kind::plain) return static_cast<const T*>(w.data) + begin;
  const bf16* scales = static_cast<const bf16*>(w.scales) + begin / w.group;
  if (w.kind == ExpertWeights::Kind::int8)
    dequantize(static_cast<const int8_t*>(w.data) + begin, scales, n, k, w.group, buffer);
  else
    dequantize(static_cast<const uint8_t*>(w.data) + begin / 2, scales, n, k, w.group, buffer);
  return buffer;
}

#if defined(LLADA_CPU_LEVEL_avx512_bf16)
// M rows of A times N rows of quantised weights as dot products; the sums of stream_tile on dequantised ones, which this never stores.
template <int M, int N, class Q>
inline void quantized_tile(const bf16* a, int64_t lda, const Q* q, const bf16* scales, int64_t k, int shift, float* c, int64_t ldc) {
  Vec acc[M][N] = {};
  const int64_t row_bytes = k / kQuantum * kQuantumBytes<Q>;
  for (int64_t i = 0; i < k; i += kQuantum, q += kQuantumBytes<Q>) {
    VecU bv[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      __builtin_prefetch(q + (N + n) * row_bytes);
      const Vec scale = splat(to_float(scales[(n * k + i) >> shift]));
      Vec v[2];
      load_quantized(q + n * row_bytes, v);
      bv[n] = (VecU)_mm512_cvtne2ps_pbh((__m512)(v[1] * scale), (__m512)(v[0] * scale));
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const VecU av = load_packed(a + m * lda + i);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = multiply_add_pairs(acc[m][n], av, bv[n]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) c[m * ldc + n] = reduce_add(acc[m][n]);
}

template <class Q>
__attribute__((noinline)) void gemm_quantized(const bf16* a, int64_t lda, int64_t m, const Q* q, const bf16* scales, int64_t n, int64_t k,
                                              int64_t group, float* c, int64_t ldc) {
  const int shift = __builtin_ctzll(uint64_t(group));
  for (int64_t j = 0; j < n; j += kDotColumns, q += kDotColumns * k / kQuantum * kQuantumBytes<Q>, scales += kDotColumns * k / group) {
    if (m == 1) quantized_tile<1, kDotColumns>(a, lda, q, scales, k, shift, c + j, ldc);
    if (m == 2) quantized_tile<2, kDotColumns>(a, lda, q, scales, k, shift, c + j, ldc);
    if (m == 3) quantized_tile<3, kDotColumns>(a, lda, q, scales, k, shift, c + j, ldc);
    if (m == 4) quantized_tile<4, kDotColumns>(a, lda, q, scales, k, shift, c + j, ldc);
  }
}
#endif

// C[m][n] = A[m][k] * rows [first, first + n) of an expert, for few rows of A; `buffer` as of expert_rows.
template <class T>
inline void gemm_few(const ExpertWeights& w, int64_t expert, int64_t rows, int64_t k, int64_t first, int64_t n, const T* a, int64_t m,
                     float* c, int64_t ldc, T* buffer) {
#if defined(LLADA_CPU_LEVEL_avx512_bf16)
  if constexpr (kPackedDepth<T> == 2) {
    if (w.kind != ExpertWeights::Kind::plain && m <= 4 && n % kDotColumns == 0 && (w.group & (w.group - 1)) == 0) {
      const int64_t begin = (expert * rows + first) * k;
      const bf16* scales = static_cast<const bf16*>(w.scales) + begin / w.group;
      if (w.kind == ExpertWeights::Kind::int8)
        return gemm_quantized(a, k, m, static_cast<const int8_t*>(w.data) + begin, scales, n, k, w.group, c, ldc);
      return gemm_quantized(a, k, m, static_cast<const uint8_t*>(w.data) + begin / 2, scales, n, k, w.group, c, ldc);
    }
  }
#endif
  gemm_stream(a, k, m, expert_rows(w, expert, rows, k, first, n, buffer), n, k, c, ldc);
}

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
