// Compiled with -ffp-contract=off, as rope, which norms rows too: the same row has the same norm in both.
#include <vector>

#include "rms_norm/params.h"

#include "rms_norm/rows.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

template <class T>
inline void add_row(const T* x, const T* residual, T* total, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(total + i, load(x + i) + load(residual + i));
  for (; i < n; ++i) total[i] = from_float<T>(to_float(x[i]) + to_float(residual[i]));
}

template <class T>
void forward(const RmsNormParams& p, const Parallel& parallel) {
  const int64_t n = p.width;
  parallel.ranges(p.rows, 16384 / (n + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(p.x) + r * n;
      if (p.residual != nullptr) {
        T* total = static_cast<T*>(p.total) + r * n;
        add_row(x, static_cast<const T*>(p.residual) + r * n, total, n);
        x = total;
      }
      p.rstd[r] = norm_row(x, static_cast<const T*>(p.weight), static_cast<T*>(p.y) + r * n, n, p.eps);
    }
  });
}

template <class T>
void backward(const RmsNormBackwardParams& p, const Parallel& parallel) {
  const int64_t n = p.width, chunks = norm_chunks(p.rows);
  const T* more = static_cast<const T*>(p.grad_total);
  std::vector<float> partial(size_t(chunks * n), 0.f);
  parallel.items(chunks, [&](ItemQueue& queue) {
    for (int64_t c; queue.next(c);)
      for (int64_t r = c * kNormChunk; r < p.rows && r < (c + 1) * kNormChunk; ++r)
        norm_row_backward(static_cast<const T*>(p.grad_y) + r * n, more == nullptr ? nullptr : more + r * n,
                          static_cast<const T*>(p.x) + r * n, static_cast<const T*>(p.weight), p.rstd[r], static_cast<T*>(p.grad_x) + r * n,
                          partial.data() + c * n, n);
  });
  sum_chunks(partial.data(), chunks, n, p.grad_weight, parallel);
}

}  // namespace

void rms_norm(const RmsNormParams& p, const Parallel& parallel) { p.bf16 ? forward<bf16>(p, parallel) : forward<float>(p, parallel); }

void rms_norm_backward(const RmsNormBackwardParams& p, const Parallel& parallel) {
  p.bf16 ? backward<bf16>(p, parallel) : backward<float>(p, parallel);
}

}  // namespace llada::LLADA_CPU_LEVEL
