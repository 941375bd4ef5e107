// Steps of attention on one tile: the rows of a tile are `tokens` consecutive queries times the `group` query heads of one KV head
// (row = token * group + head), its columns up to kKeys keys. Scores lie in a [rows, kKeys] buffer. Include last, as common/simd.h.
#pragma once

#include "common/gemm.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

constexpr int64_t kKeys = 64;  // a multiple of every kLanes

// Keys [begin, end) of one block of kKeys, as columns of the score buffer. Column 0 is key `base`, which is rounded down (and `width`
// up) to whole vectors: columns outside [first, last) hold other keys' scores and never count.
struct Columns {
  int64_t begin, end, base, width, first, last;
  Columns(int64_t block_start, int64_t begin_, int64_t end_) : begin(begin_), end(end_) {
    const int64_t lo = begin - block_start, hi = end - block_start, lo_vector = lo / kLanes * kLanes;
    base = block_start + lo_vector;
    width = (hi + kLanes - 1) / kLanes * kLanes - lo_vector;
    first = lo - lo_vector;
    last = hi - lo_vector;
  }
  int64_t offset(int64_t block_start) const { return base - block_start; }
};

// Columns that one query sees.
struct Span {
  int64_t first, last;
};

// The query's own interval within `columns`; the caller knows the columns' range already when the tile is uniform.
inline Span span_of(const int32_t* interval, const Columns& columns) {
  const int64_t begin = interval[0] > columns.begin ? interval[0] : columns.begin;
  const int64_t end = interval[1] < columns.end ? interval[1] : columns.end;
  return {begin - columns.base, end > begin ? end - columns.base : begin - columns.base};
}

// out[rows][d] = scale * x of the tile: the group's heads are adjacent, so a token is one contiguous piece of group * d.
template <class T>
inline void gather_rows(const T* x, int64_t token_stride, int64_t tokens, int64_t piece, float scale, float* out) {
  const int64_t main = piece / kLanes * kLanes;
  for (int64_t t = 0; t < tokens; ++t, x += token_stride, out += piece) {
    for (int64_t i = 0; i < main; i += kLanes) store(out + i, load(x + i) * scale);
    for (int64_t i = main; i < piece; ++i) out[i] = to_float(x[i]) * scale;
  }
}

template <class T>
inline void scatter_rows(const float* rows, int64_t tokens, int64_t piece, float scale, T* x, int64_t token_stride) {
  const int64_t main = piece / kLanes * kLanes;
  for (int64_t t = 0; t < tokens; ++t, x += token_stride, rows += piece) {
    for (int64_t i = 0; i < main; i += kLanes) store(x + i, load(rows + i) * scale);
    for (int64_t i = main; i < piece; ++i) x[i] = from_float<T>(rows[i] * scale);
  }
}

// One float per row: [tokens, heads] <-> [rows].
inline void gather_scalars(const float* x, int64_t heads, int64_t tokens, int64_t group, float* rows) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t g = 0; g < group; ++g) rows[t * group + g] = x[t * heads + g];
}

// out[d][kKeys], columns [at, at + n) = x[n][d]^T.
template <class T>
inline void transpose_keys(const T* x, int64_t stride, int64_t n, int64_t d, T* out, int64_t at = 0) {
  for (int64_t i0 = 0; i0 < d; i0 += 16) {
    const int64_t i1 = i0 + 16 < d ? i0 + 16 : d;
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = i0; i < i1; ++i) out[i * kKeys + at + j] = x[j * stride + i];
  }
}

template <class T>
inline void clear_keys(int64_t from, int64_t d, T* out) {
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = from; j < kKeys; ++j) out[i * kKeys + j] = T{};
}

// Online softmax: turns scores into exp(score - new maximum), 0 outside the row's span, and brings row_max, row_sum and the
// unnormalised out[rows][d] up to date. span(token) gives the columns that a token sees.
template <class SpanOf>
inline void softmax_step(float* scores, int64_t tokens, int64_t group, int64_t width, SpanOf span, float* row_max, float* row_sum,
                         float* out, int64_t d) {
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  for (int64_t t = 0; t < tokens; ++t) {
    const Span seen = span(t);
    for (int64_t g = 0; g < group; ++g) {
      const int64_t r = t * group + g;
      float* s = scores + r * kKeys;
      if (seen.last <= seen.first) {
        for (int64_t i = 0; i < width; i += kLanes) store(s + i, Vec{});
        continue;
      }
      for (int64_t i = 0; i < seen.first; ++i) s[i] = kHidden;
      for (int64_t i = seen.last; i < width; ++i) s[i] = kHidden;
      Vec top = load(s);
      for (int64_t i = kLanes; i < width; i += kLanes) top = vmax(load(s + i), top);
      const float before = row_max[r], peak = reduce_max(top), now = peak > before ? peak : before;
      Vec sum{};
      for (int64_t i = 0; i < width; i += kLanes) {
        const Vec p = vexp(load(s + i) - now);
        store(s + i, p);
        sum += p;
      }
      if (now != before) {
        const float shrink = std::exp(before - now);  // 0 the first time
        row_sum[r] *= shrink;
        row_max[r] = now;
        float* o = out + r * d;
        for (int64_t i = 0; i < d; ++i) o[i] *= shrink;
      }
      row_sum[r] += reduce_add(sum);
    }
  }
}

// Divides by the sums; 0 and a log-sum of -inf for a row that saw no key.
inline void softmax_finish(int64_t rows, int64_t d, const float* row_max, float* row_sum, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const float inverse = row_sum[r] == 0.f ? 0.f : 1.f / row_sum[r];
    for (int64_t i = 0; i < d; ++i) out[r * d + i] *= inverse;
    row_sum[r] = row_max[r] + std::log(row_sum[r]);  // -inf + -inf where nothing was seen
  }
}

// Turns scores into probabilities exp(score - lse), 0 outside the row's span.
template <class SpanOf>
inline void probabilities(float* scores, int64_t tokens, int64_t group, int64_t width, SpanOf span, const float* lse) {
  for (int64_t t = 0; t < tokens; ++t) {
    const Span seen = span(t);
    for (int64_t r = t * group; r < (t + 1) * group; ++r) {
      float* s = scores + r * kKeys;
      for (int64_t i = 0; i < width; i += kLanes) store(s + i, vexp(load(s + i) - lse[r]));
      for (int64_t i = 0; i < seen.first; ++i) s[i] = 0.f;
      for (int64_t i = seen.last; i < width; ++i) s[i] = 0.f;
    }
  }
}

// grad_p := p * (grad_p - delta): the gradient of the scores.
inline void score_gradients(const float* p, float* grad_p, int64_t rows, int64_t width, const float* delta) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = r * kKeys; i < r * kKeys + width; i += kLanes) store(grad_p + i, load(p + i) * (load(grad_p + i) - delta[r]));
}

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
