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
      fetch(q + kFetchBytes);
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
// 64 quantised weights as integers of 16 bits. Those of 4 bits keep their offset of 8, and come as columns 0-15 and 32-47, then the others.
inline void widen_16(const int8_t* p, __m512i (&w)[2]) {
  w[0] = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  w[1] = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32)));
}
inline void widen_16(const uint8_t* p, __m512i (&w)[2]) {
  const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  w[0] = _mm512_and_si512(both, _mm512_set1_epi16(15));
  w[1] = _mm512_srli_epi16(both, 4);
}

// Few rows of bf16 as integers of 16 bits with a scale for every group of columns: what quantised weights are multiplied with as they come,
// in integers (vpdpwssd), which takes half of the instructions of bf16. An error of 2^-16 of the largest of a group, where bf16 has 2^-9 of
// each weight.
class IntegerRows {
 public:
  static constexpr int64_t kMaxRows = 4, kMaxGroups = 512, kStep = 2 * kQuantum;

  static bool serves(const ExpertWeights& w, int64_t m, int64_t k) {
    return w.kind != ExpertWeights::Kind::plain && (w.group == kStep || w.group == kQuantum) && m <= kMaxRows && k % kStep == 0 &&
           k / w.group <= kMaxGroups;
  }

  void set(const ExpertWeights& w, const bf16* a, int64_t m, int64_t k) {
    m_ = m, k_ = k, group_ = w.group;
    const int64_t groups = k / group_;
    padded_ = (groups + kLanes - 1) / kLanes * kLanes;
    int16_t* to = integers_.reserve(m * k);
    float *scales = scales_.reserve(m * padded_), *sums = sums_.reserve(m * padded_);
    std::memset(scales, 0, size_t(m * padded_) * sizeof(float)), std::memset(sums, 0, size_t(m * padded_) * sizeof(float));
    for (int64_t r = 0; r < m; ++r)
      for (int64_t g = 0; g < groups; ++g, a += group_) {
        Vec largest{}, finite{}, sum{};
        for (int64_t j = 0; j < group_; j += kLanes) {
          const Vec v = load(a + j);
          largest = vmax((Vec)((VecU)v & 0x7fffffffu), largest);
          finite += v * 0.f;
        }
        const float peak = reduce_max(largest), inverse = peak > 1e-30f ? 32767.f / peak : 0.f;
        for (int64_t j = 0; j < group_; j += kLanes) {
          const __m512i v = _mm512_cvtps_epi32((__m512)(load(a + j) * inverse));
          const int64_t column = g * group_ + j;
          _mm256_storeu_si256(
              reinterpret_cast<__m256i*>(to + r * k + (w.kind == ExpertWeights::Kind::int4 ? in_order_of_4_bits(column) : column)),
              _mm512_cvtsepi32_epi16(v));
          sum += (Vec)_mm512_cvtepi32_ps(v);
        }
        const float scale = peak * (1.f / 32767.f) + reduce_add(finite);  // NaN if an element is no finite number
        scales[r * padded_ + g] = scale;
        sums[r * padded_ + g] = scale * reduce_add(sum);
      }
  }

  // C[m][n] = A times n rows of weights, a multiple of kDotColumns.
  template <class Q>
  void multiply(const Q* q, const bf16* scales, int64_t n, float* c, int64_t ldc) const {
    if (m_ == 1) rows<1>(q, scales, n, c, ldc);
    if (m_ == 2) rows<2>(q, scales, n, c, ldc);
    if (m_ == 3) rows<3>(q, scales, n, c, ldc);
    if (m_ == 4) rows<4>(q, scales, n, c, ldc);
  }

 private:
  // Of 4 vectors of columns the second and the third change places.
  static int64_t in_order_of_4_bits(int64_t column) {
    const int64_t i = column / kLanes % 4;
    return column + (i == 1 ? kLanes : i == 2 ? -kLanes : 0);
  }

  template <int M, class Q>
  __attribute__((noinline)) void rows(const Q* q, const bf16* scales, int64_t n, float* c, int64_t ldc) const {
    constexpr int N = M <= 2 ? 4 : 2;
    static_assert(kDotColumns % N == 0);
    const int64_t groups = k_ / group_, row_bytes = k_ / kQuantum * kQuantumBytes<Q>;
    alignas(64) float both[M * N * kMaxGroups];  // scales of a row of A and of weights together
    for (int64_t j = 0; j < n; j += N, q += N * row_bytes) {
      Vec offsets[M][N] = {};  // what the 8 too much in weights of 4 bits makes
#pragma GCC unroll 4
      for (int w = 0; w < N; ++w, scales += groups)
        for (int64_t g = 0; g < groups; g += kLanes) {
          const int64_t left = groups - g;
          fetch(scales + g + N * groups);
          const __mmask16 mask = left < kLanes ? __mmask16((1u << left) - 1) : __mmask16(0xffff);
          const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, scales + g)), 16);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            store(both + (m * N + w) * padded_ + g, (Vec)bits * load(scales_.get() + m * padded_ + g));
            if (!std::is_same_v<Q, int8_t>) offsets[m][w] += (Vec)bits * load(sums_.get() + m * padded_ + g);
          }
        }
      Vec sums[M][N];
      group_ == kStep ? tile<M, N, 1>(q, both, sums) : tile<M, N, 2>(q, both, sums);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int w = 0; w < N; ++w) c[m * ldc + j + w] = reduce_add(sums[m][w] - 8.f * offsets[m][w]);
    }
  }

  // kGroups: of a step. Where they are two, each has a vector of weights of 8 bits, and half of the lanes of both vectors of 4 bits.
  template <int M, int N, int kGroups, class Q>
  void tile(const Q* q, const float* scales, Vec (&acc)[M][N]) const {
    const int64_t row_bytes = k_ / kQuantum * kQuantumBytes<Q>, ahead = N * row_bytes > kFetchBytes ? N * row_bytes : kFetchBytes;
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = Vec{};
    for (int64_t i = 0; i < k_; i += kStep, q += 2 * kQuantumBytes<Q>, scales += kGroups)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        fetch(q + n * row_bytes + ahead);
        __m512i w[2];
        widen_16(q + n * row_bytes, w);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const int16_t* a = integers_.get() + m * k_ + i;
          const float* s = scales + (m * N + n) * padded_;
          const auto dot = [&](__m512i sum, int part) {
            return _mm512_dpwssd_epi32(sum, w[part], _mm512_loadu_si512(a + part * kQuantum));
          };
          const auto add = [&](__m512i sum, __m512 scale) { acc[m][n] += (Vec)_mm512_cvtepi32_ps(sum) * (Vec)scale; };
          const __m512i zero = _mm512_setzero_si512();
          __m512 scale = _mm512_set1_ps(s[0]);
          if constexpr (kGroups == 2 && std::is_same_v<Q, int8_t>) {
            add(dot(zero, 0), scale);
            add(dot(zero, 1), _mm512_set1_ps(s[1]));
          } else {
            if constexpr (kGroups == 2) scale = _mm512_mask_broadcastss_ps(scale, 0xff00, _mm_load_ss(s + 1));
            add(dot(dot(zero, 0), 1), scale);
          }
        }
      }
  }

  int64_t m_ = 0, k_ = 0, group_ = 0, padded_ = 0;  // padded: groups of a row, whole vectors
  Buffer<int16_t> integers_;
  Buffer<float> scales_, sums_;  // of groups; sums in the units of A
};
#endif

// C[m][n] = A[m][k] * rows [first, first + n) of an expert, for few rows of A.
template <class T>
class FewRows {
 public:
  // A must outlive the products.
  void set([[maybe_unused]] const ExpertWeights& w, const T* a, int64_t m, int64_t k) {
    a_ = a, m_ = m, k_ = k;
#if defined(LLADA_CPU_LEVEL_avx512_bf16)
    if constexpr (std::is_same_v<T, bf16>) {
      as_integers_ = IntegerRows::serves(w, m, k);
      if (as_integers_) integers_.set(w, a, m, k);
    }
#endif
  }
  // `buffer` as of expert_rows.
  void multiply(const ExpertWeights& w, int64_t expert, int64_t rows, int64_t first, int64_t n, float* c, int64_t ldc, T* buffer) const {
#if defined(LLADA_CPU_LEVEL_avx512_bf16)
    if (as_integers_ && n % kDotColumns == 0) {
      const int64_t begin = (expert * rows + first) * k_;
      const bf16* scales = static_cast<const bf16*>(w.scales) + begin / w.group;
      if (w.kind == ExpertWeights::Kind::int8) return integers_.multiply(static_cast<const int8_t*>(w.data) + begin, scales, n, c, ldc);
      return integers_.multiply(static_cast<const uint8_t*>(w.data) + begin / 2, scales, n, c, ldc);
    }
#endif
    gemm_stream(a_, k_, m_, expert_rows(w, expert, rows, k_, first, n, buffer), n, k_, c, ldc);
  }

 private:
  const T* a_ = nullptr;
  int64_t m_ = 0, k_ = 0;
#if defined(LLADA_CPU_LEVEL_avx512_bf16)
  bool as_integers_ = false;
  IntegerRows integers_;
#endif
};

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
