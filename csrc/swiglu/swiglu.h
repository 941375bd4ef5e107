// SwiGLU of one vector of features, shared by the op and by moe_mlp. Included after common/simd.h.
#pragma once

#include "common/simd.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

inline Vec sigmoid(Vec x) { return 1.f / (1.f + vexp(-x)); }

// Rounded as the official code does in T: silu, then the product (by the caller's store).
template <class T>
inline Vec swiglu_forward(Vec gate, Vec up) {
  return round_to<T>(gate / (1.f + vexp(-gate))) * up;
}

struct SwigluGradients {
  Vec gate, up;
};

inline SwigluGradients swiglu_gradients(Vec grad, Vec gate, Vec up) {
  const Vec s = sigmoid(gate);
  return {grad * up * s * (1.f + gate * (1.f - s)), grad * gate * s};
}

// f(i, n): the features from i on, n of them: kLanes, or fewer for the last.
template <class F>
inline void for_features(int64_t width, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) f(i, int64_t(kLanes));
  if (i < width) f(i, width - i);
}
template <class T>
inline Vec load_n(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load_partial(p, n);
}
template <class T>
inline void store_n(T* p, Vec v, int64_t n) {
  n == kLanes ? store(p, v) : store_partial(p, v, n);
}

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
