#include <vector>

#include "rms_norm/params.h"

#include "common/simd.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

template <class T>
void forward(const RmsNormParams& p, const Parallel& parallel) {
  const int64_t n = p.width, main = n / kLanes * kLanes;
  const T* weight = static_cast<const T*>(p.weight);
  parallel.ranges(p.rows, 16384 / (n + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(p.x) + r * n;
      T* y = static_cast<T*>(p.y) + r * n;
      Vec sum{};
      for (int64_t i = 0; i < main; i += kLanes) sum += load(x + i) * load(x + i);
      const Vec tail = load_partial(x + main, n - main);
      sum += tail * tail;
      const float rstd = 1.f / std::sqrt(reduce_add(sum) / float(n) + p.eps);
      p.rstd[r] = rstd;
      for (int64_t i = 0; i < main; i += kLanes) store(y + i, load(weight + i) * round_to<T>(load(x + i) * rstd));
      store_partial(y + main, load_partial(weight + main, n - main) * round_to<T>(tail * rstd), n - main);
    }
  });
}

// With z = x * rstd: dz = T(dy * w), dx = rstd * (dz - z * mean(dz * z)), dw = sum over rows of T(dy * T(z)).
// dw is summed per fixed chunk of rows and then over the chunks in order, so it does not depend on the number of threads.
template <class T>
void backward(const RmsNormBackwardParams& p, const Parallel& parallel) {
  const int64_t n = p.width, main = n / kLanes * kLanes, chunk = 128;
  const int64_t chunks = (p.rows + chunk - 1) / chunk;
  const T* weight = static_cast<const T*>(p.weight);
  std::vector<float> partial(size_t(chunks * n), 0.f);
  parallel.items(chunks, [&](ItemQueue& queue) {
    for (int64_t c; queue.next(c);) {
      float* dw = partial.data() + c * n;
      for (int64_t r = c * chunk; r < p.rows && r < (c + 1) * chunk; ++r) {
        const T* x = static_cast<const T*>(p.x) + r * n;
        const T* dy = static_cast<const T*>(p.grad_y) + r * n;
        T* dx = static_cast<T*>(p.grad_x) + r * n;
        const float rstd = p.rstd[r];
        Vec dot{};
        for (int64_t i = 0; i < main; i += kLanes) {
          const Vec z = load(x + i) * rstd;
          dot += round_to<T>(load(dy + i) * load(weight + i)) * z;
          store(dw + i, load(dw + i) + round_to<T>(load(dy + i) * round_to<T>(z)));
        }
        const Vec z_tail = load_partial(x + main, n - main) * rstd, dy_tail = load_partial(dy + main, n - main);
        const Vec dz_tail = round_to<T>(dy_tail * load_partial(weight + main, n - main));
        dot += dz_tail * z_tail;
        store_partial(dw + main, load_partial(dw + main, n - main) + round_to<T>(dy_tail * round_to<T>(z_tail)), n - main);
        const float mean = reduce_add(dot) / float(n);
        for (int64_t i = 0; i < main; i += kLanes) {
          const Vec z = load(x + i) * rstd;
          store(dx + i, (round_to<T>(load(dy + i) * load(weight + i)) - z * mean) * rstd);
        }
        store_partial(dx + main, (dz_tail - z_tail * mean) * rstd, n - main);
      }
    }
  });
  parallel.ranges(n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) p.grad_weight[i] = 0.f;
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t i = begin; i < end; ++i) p.grad_weight[i] += partial[size_t(c * n + i)];
  });
}

}  // namespace

void rms_norm(const RmsNormParams& p, const Parallel& parallel) { p.bf16 ? forward<bf16>(p, parallel) : forward<float>(p, parallel); }

void rms_norm_backward(const RmsNormBackwardParams& p, const Parallel& parallel) {
  p.bf16 ? backward<bf16>(p, parallel) : backward<float>(p, parallel);
}

}  // namespace llada::LLADA_CPU_LEVEL
