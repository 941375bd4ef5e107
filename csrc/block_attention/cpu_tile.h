// Steps of attention on one tile: the rows of a tile are `tokens` consecutive queries times the `group` query heads of one KV head
// (row = token * group + head), its columns up to kStepKeys keys. Include last, as common/simd.h.
//
// Everything that is multiplied is an Operand: bf16 where the level multiplies pairs of bf16 and the tensors are bf16, else float.
#pragma once

#include "common/packed_gemm.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

constexpr int64_t kKeys = 64;  // a multiple of every kPanel

// Keys and tokens that are worked on at once. On tiles sums over keys are loaded and stored at every step, which costs as much as
// multiplying 64 keys: so there are more of them, and of fewer rows, whose scores stay in the nearest cache.
template <class T>
constexpr int64_t kStepKeys = kOnTiles<T> ? 256 : kKeys;
template <class T>
inline int64_t step_tokens(int64_t tokens, int64_t group) {
  constexpr int64_t kStepRows = 32;
  return !kOnTiles<T> ? tokens : group < kStepRows ? kStepRows / group : 1;
}

template <class T>
using Operand = std::conditional_t<kPackedDepth<T> == 2, bf16, float>;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Keys [begin, end) of one block of keys, as columns of the score buffer. Column 0 is key `base`; base and width are whole
// panels, so columns outside [first, last) belong to other keys (or to none) and never count.
struct Columns {
  int64_t begin, end, base, width, first, last;
  Columns(int64_t block_start, int64_t begin_, int64_t end_) : begin(begin_), end(end_) {
    base = block_start + (begin - block_start) / kPanel * kPanel;
    width = round_up(end - base, kPanel);
    first = begin - base;
    last = end - base;
  }
};

// Columns that one query sees.
struct Span {
  int64_t first, last;
};

// The part of a query's interval that lies within `columns`.
inline Span span_of(const int32_t* interval, const Columns& columns) {
  const int64_t begin = interval[0] > columns.begin ? interval[0] : columns.begin;
  const int64_t end = interval[1] < columns.end ? interval[1] : columns.end;
  return {begin - columns.base, end > begin ? end - columns.base : begin - columns.base};
}

template <class T>
inline Vec load_vector(const T* p, int64_t i, int64_t n) {
  return i + kLanes <= n ? load(p + i) : load_partial(p + i, n - i);
}

// out[count][piece] = pieces of x that are `stride` apart.
template <class T>
inline void gather(const T* x, int64_t stride, int64_t count, int64_t piece, Operand<T>* out) {
  for (int64_t t = 0; t < count; ++t, x += stride, out += piece) {
    if constexpr (std::is_same_v<T, Operand<T>>) {
      std::memcpy(out, x, size_t(piece) * sizeof(T));
    } else {
      int64_t i = 0;
      for (; i + kLanes <= piece; i += kLanes) store(out + i, load(x + i));
      for (; i < piece; ++i) out[i] = to_float(x[i]);
    }
  }
}

template <class T>
inline void scatter(const float* rows, int64_t count, int64_t piece, float scale, T* x, int64_t stride) {
  for (int64_t t = 0; t < count; ++t, x += stride, rows += piece) {
    int64_t i = 0;
    for (; i + kLanes <= piece; i += kLanes) store(x + i, load(rows + i) * scale);
    for (; i < piece; ++i) x[i] = from_float<T>(rows[i] * scale);
  }
}

// One float per row from a [tokens, heads] array.
inline void gather_scalars(const float* x, int64_t heads, int64_t tokens, int64_t group, float* rows) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t g = 0; g < group; ++g) rows[t * group + g] = x[t * heads + g];
}

inline void store_operand(float* p, Vec v) { store(p, v); }
inline void store_operand(bf16* p, Vec v) {
#if defined(LLADA_CPU_LEVEL_avx512_bf16)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof h);
#else
  store(p, v);
#endif
}

inline float peak_of(Vec v) {
  Vec4 parts[kLanes / 4];
  std::memcpy(parts, &v, sizeof v);
  for (int half = kLanes / 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] = parts[i] > parts[i + half] ? parts[i] : parts[i + half];
  const Vec4 x = parts[0];
  const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}

// e^x for x <= 0 (or barely above), as vexp of simd.h without what only positive x need: 0 below -87, also for -inf; NaN stays NaN.
inline Vec exp_of_negative(Vec x) {
  const Vec low = splat(-87.f), magic = splat(12582912.f);
#if defined(LLADA_CPU_LEVEL_avx512)
  const Vec clamped = x;
#else
  const Vec clamped = x < low ? low : x;
#endif
  const Vec shifted = clamped * 1.44269504f + magic, n = shifted - magic;
  Vec r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
#if defined(LLADA_CPU_LEVEL_avx512)
  return (Vec)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ), (__m512)y, (__m512)n);
#else
  const Vec power = (Vec)(((VecI)shifted << 23) + 0x3f800000);  // the low bits of `shifted` are n: moved into the exponent they are 2^n
  return x < low ? Vec{} : y * power;
#endif
}

// 2^x for x <= 0 (or barely above), relative error below 3e-6: for probabilities that are rounded to bf16. 0 below -126, also for -inf; NaN
// stays NaN.
inline Vec exp2_of_negative(Vec x) {
  const Vec low = splat(-126.f), magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x + magic, n = shifted - magic, r = x - n;
  Vec y = splat(9.5701e-3f);
  y = y * r + 5.591786e-2f;
  y = y * r + 2.4024745e-1f;
  y = y * r + 6.9312181e-1f;
  y = y * r + 9.9999926e-1f;
#if defined(LLADA_CPU_LEVEL_avx512)
  return (Vec)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ), (__m512)y, (__m512)n);
#else
  return x < low ? Vec{} : y * (Vec)(((VecI)shifted << 23) + 0x3f800000);
#endif
}

// What scores are referred to: a row may have seen nothing but -inf so far (products overflow), and -inf minus itself is no number.
inline float finite_peak(float peak) {
  constexpr float lowest = std::numeric_limits<float>::lowest();
  return peak > lowest ? peak : lowest;
}

inline void hide(float* row, Span seen, int64_t width, float value) {
  for (int64_t i = 0; i < seen.first; ++i) row[i] = value;
  for (int64_t i = seen.last; i < width; ++i) row[i] = value;
}

// Online softmax: p = exp(scale * score - new maximum), 0 outside the row's span; brings row_max, row_sum and the unnormalised
// out[rows][d] up to date. scores and p are [rows][stride] and may be the same. span(token) gives the columns that a token sees.
template <class P, class SpanOf>
inline void softmax_step(float* scores, P* p, int64_t stride, int64_t tokens, int64_t group, int64_t width, float scale, SpanOf span,
                         float* row_max, float* row_sum, float* out, int64_t d) {
  const float factor = scale > 0 ? scale : 1.f;
  // All maxima first: a row's exponentials wait for its maximum, the maxima for nothing.
  for (int64_t t = 0; t < tokens; ++t) {
    const Span seen = span(t);
    if (seen.last <= seen.first) continue;
    for (int64_t r = t * group; r < (t + 1) * group; ++r) {
      float* s = scores + r * stride;
      if (!(scale > 0))  // -inf times it would not hide
        for (int64_t i = 0; i < width; i += kLanes) store(s + i, load(s + i) * scale);
      hide(s, seen, width, -std::numeric_limits<float>::infinity());
      Vec top = load(s), other = load(s + kLanes);
      for (int64_t i = kPanel; i < width; i += kPanel) top = vmax(load(s + i), top), other = vmax(load(s + i + kLanes), other);
      const float before = row_max[r], peak = peak_of(vmax(other, top)) * factor;
      if (!(peak > before)) continue;
      const float shrink = std::exp(before - peak);  // 0 the first time
      row_sum[r] *= shrink;
      row_max[r] = peak;
      float* o = out + r * d;
      int64_t i = 0;
      for (; i + kLanes <= d; i += kLanes) store(o + i, load(o + i) * shrink);
      for (; i < d; ++i) o[i] *= shrink;
    }
  }
  constexpr bool kRounded = !std::is_same_v<P, float>;
  constexpr float kLog2E = 1.44269504f;
  for (int64_t t = 0; t < tokens; ++t) {
    const Span seen = span(t);
    for (int64_t r = t * group; r < (t + 1) * group; ++r) {
      const float* s = scores + r * stride;
      P* row = p + r * stride;
      if (seen.last <= seen.first) {
        for (int64_t i = 0; i < width; i += kPanel) store_both(row + i, Vec{}, Vec{});
        continue;
      }
      const float shift = row_max[r] == -std::numeric_limits<float>::infinity() ? 0.f : row_max[r];  // -inf minus itself is no number
      const auto probability = [&](Vec score) {
        if constexpr (kRounded) return exp2_of_negative(score * (factor * kLog2E) - shift * kLog2E);
        return exp_of_negative(score * factor - shift);
      };
      Vec sum{}, other{};
      for (int64_t i = 0; i < width; i += kPanel) {
        const Vec low = probability(load(s + i)), high = probability(load(s + i + kLanes));
        store_both(row + i, low, high);
        sum += low, other += high;
      }
      row_sum[r] += reduce_add(sum + other);
    }
  }
}

// Divides by the sums and leaves log-sums in their place: 0 and -inf for a row that saw no key.
inline void softmax_finish(int64_t rows, int64_t d, const float* row_max, float* row_sum, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const float inverse = row_sum[r] == 0.f ? 0.f : 1.f / row_sum[r];
    for (int64_t i = 0; i < d; ++i) out[r * d + i] *= inverse;
    row_sum[r] = row_max[r] + std::log(row_sum[r]);
  }
}

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
