// RMSNorm of single rows: what rms_norm and rope have in common. Included after the standard headers; compiled without fused
// multiply-adds in both, so that a norm gives the same bits in either.
#pragma once

#include "common/simd.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

// y = weight * T(x * rstd); returns rstd = 1 / sqrt(mean(x^2) + eps). y may be x.
template <class T>
inline float norm_row(const T* x, const T* weight, T* y, int64_t n, float eps) {
  const int64_t main = n / kLanes * kLanes;
  Vec sum{};
  for (int64_t i = 0; i < main; i += kLanes) sum += load(x + i) * load(x + i);
  const Vec tail = main < n ? load_partial(x + main, n - main) : Vec{};
  sum += tail * tail;
  const float rstd = 1.f / std::sqrt(reduce_add(sum) / float(n) + eps);
  for (int64_t i = 0; i < main; i += kLanes) store(y + i, load(weight + i) * round_to<T>(load(x + i) * rstd));
  if (main < n) store_partial(y + main, load_partial(weight + main, n - main) * round_to<T>(tail * rstd), n - main);
  return rstd;
}

// With z = x * rstd: dz = T(dy * w), dx = rstd * (dz - z * mean(dz * z)), dw += T(dy * T(z)). dx may be dy. With `more`, dx is rounded to T
// and more is added, as autograd adds the gradients of two uses of x.
template <class T>
inline void norm_row_backward(const T* dy, const T* more, const T* x, const T* weight, float rstd, T* dx, float* dw, int64_t n) {
  const int64_t main = n / kLanes * kLanes, rest = n - main;
  Vec dot{};
  for (int64_t i = 0; i < main; i += kLanes) {
    const Vec z = load(x + i) * rstd;
    dot += round_to<T>(load(dy + i) * load(weight + i)) * z;
    store(dw + i, load(dw + i) + round_to<T>(load(dy + i) * round_to<T>(z)));
  }
  Vec z_tail{}, dz_tail{};
  if (rest > 0) {
    const Vec dy_tail = load_partial(dy + main, rest);
    z_tail = load_partial(x + main, rest) * rstd;
    dz_tail = round_to<T>(dy_tail * load_partial(weight + main, rest));
    dot += dz_tail * z_tail;
    store_partial(dw + main, load_partial(dw + main, rest) + round_to<T>(dy_tail * round_to<T>(z_tail)), rest);
  }
  const float mean = reduce_add(dot) / float(n);
  for (int64_t i = 0; i < main; i += kLanes) {
    const Vec z = load(x + i) * rstd;
    const Vec v = (round_to<T>(load(dy + i) * load(weight + i)) - z * mean) * rstd;
    store(dx + i, more == nullptr ? v : round_to<T>(v) + load(more + i));
  }
  if (rest > 0) {
    const Vec v = (dz_tail - z_tail * mean) * rstd;
    store_partial(dx + main, more == nullptr ? v : round_to<T>(v) + load_partial(more + main, rest), rest);
  }
}

// Rows whose weight gradients are summed one after the other. The sums of such chunks are added in order, so a gradient does not depend
// on the number of threads.
constexpr int64_t kNormChunk = 128;

inline int64_t norm_chunks(int64_t rows) { return (rows + kNormChunk - 1) / kNormChunk; }

// dw[i] = partial[0][i] + partial[1][i] + ...
inline void sum_chunks(const float* partial, int64_t chunks, int64_t n, float* dw, const Parallel& parallel) {
  parallel.ranges(n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) dw[i] = 0.f;
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t i = begin; i < end; ++i) dw[i] += partial[c * n + i];
  });
}

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
