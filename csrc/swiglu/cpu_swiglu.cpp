#include "swiglu/params.h"

#include "swiglu/swiglu.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

template <class T>
void forward(const SwigluParams& p, const Parallel& parallel) {
  parallel.ranges(p.rows, 8192 / (p.width + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* gate = static_cast<const T*>(p.gate_up) + r * 2 * p.width;
      T* y = static_cast<T*>(p.y) + r * p.width;
      for_features(p.width,
                   [&](int64_t i, int64_t n) { store_n(y + i, swiglu_forward<T>(load_n(gate + i, n), load_n(gate + p.width + i, n)), n); });
    }
  });
}

template <class T>
void backward(const SwigluBackwardParams& p, const Parallel& parallel) {
  parallel.ranges(p.rows, 8192 / (p.width + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* gate = static_cast<const T*>(p.gate_up) + r * 2 * p.width;
      const T* grad = static_cast<const T*>(p.grad_y) + r * p.width;
      T* out = static_cast<T*>(p.grad_gate_up) + r * 2 * p.width;
      for_features(p.width, [&](int64_t i, int64_t n) {
        const SwigluGradients g = swiglu_gradients(load_n(grad + i, n), load_n(gate + i, n), load_n(gate + p.width + i, n));
        store_n(out + i, g.gate, n);
        store_n(out + p.width + i, g.up, n);
      });
    }
  });
}

}  // namespace

void swiglu(const SwigluParams& p, const Parallel& parallel) { p.bf16 ? forward<bf16>(p, parallel) : forward<float>(p, parallel); }

void swiglu_backward(const SwigluBackwardParams& p, const Parallel& parallel) {
  p.bf16 ? backward<bf16>(p, parallel) : backward<float>(p, parallel);
}

}  // namespace llada::LLADA_CPU_LEVEL
