// Compiled with -ffp-contract=off: a fused multiply-add would skip the rounding of a product.
#include <cstring>

#include "rope/params.h"

#include "common/simd.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

// One pair of vectors (dims i.. and i + rotary / 2 ..). The minus sign commutes with rounding.
template <class T, bool kTransposed>
inline void turn(Vec& first, Vec& second, Vec cos1, Vec cos2, Vec sin1, Vec sin2) {
  const Vec a = round_to<T>(first * cos1), d = round_to<T>(second * cos2);
  const Vec b = round_to<T>(second * (kTransposed ? sin2 : sin1));
  const Vec c = round_to<T>(first * (kTransposed ? sin1 : sin2));
  first = kTransposed ? a + b : a - b;
  second = kTransposed ? d - c : d + c;
}

template <class T, bool kTransposed>
void apply(const RopeParams& p, const Parallel& parallel) {
  const int64_t half = p.rotary / 2, main = half / kLanes * kLanes, tail = half - main;
  parallel.ranges(p.tokens, 32768 / (p.heads * p.dim + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* cos = static_cast<const T*>(p.cos) + t * p.rotary;
      const T* sin = static_cast<const T*>(p.sin) + t * p.rotary;
      for (int64_t h = 0; h < p.heads; ++h) {
        const T* x = static_cast<const T*>(p.x) + (t * p.heads + h) * p.dim;
        T* y = static_cast<T*>(p.y) + (t * p.heads + h) * p.dim;
        for (int64_t i = 0; i < main; i += kLanes) {
          Vec first = load(x + i), second = load(x + half + i);
          turn<T, kTransposed>(first, second, load(cos + i), load(cos + half + i), load(sin + i), load(sin + half + i));
          store(y + i, first);
          store(y + half + i, second);
        }
        if (tail > 0) {
          const auto part = [&](const T* table) { return load_partial(table + main, tail); };
          Vec first = part(x), second = part(x + half);
          turn<T, kTransposed>(first, second, part(cos), part(cos + half), part(sin), part(sin + half));
          store_partial(y + main, first, tail);
          store_partial(y + half + main, second, tail);
        }
        std::memcpy(y + p.rotary, x + p.rotary, size_t(p.dim - p.rotary) * sizeof(T));
      }
    }
  });
}

template <class T>
void dispatch(const RopeParams& p, const Parallel& parallel) {
  p.transposed ? apply<T, true>(p, parallel) : apply<T, false>(p, parallel);
}

}  // namespace

void rope(const RopeParams& p, const Parallel& parallel) { p.bf16 ? dispatch<bf16>(p, parallel) : dispatch<float>(p, parallel); }

}  // namespace llada::LLADA_CPU_LEVEL
