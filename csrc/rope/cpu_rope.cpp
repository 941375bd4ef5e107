// Compiled with -ffp-contract=off: a fused multiply-add would skip the rounding of a product.
#include <cstring>
#include <vector>

#include "rope/params.h"

#include "rms_norm/rows.h"

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

// One head. y may be x.
template <class T, bool kTransposed>
inline void turn_head(const T* x, const T* cos, const T* sin, T* y, int64_t dim, int64_t rotary) {
  const int64_t half = rotary / 2, main = half / kLanes * kLanes, tail = half - main;
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
  if (y != x) std::memcpy(y + rotary, x + rotary, size_t(dim - rotary) * sizeof(T));
}

// Heads begin .. end, counted over the tokens. dw: where their weight gradients are added, in a backward with norms.
template <class T, bool kTransposed>
void turn_heads(const RopeParams& p, const RopeHeads& h, int64_t begin, int64_t end, float* dw) {
  const T* weight = static_cast<const T*>(h.weight);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = i / h.heads, head = i % h.heads;
    const T* x = static_cast<const T*>(h.x) + token * h.stride + head * p.dim;
    const T *cos = static_cast<const T*>(p.cos) + token * p.rotary, *sin = static_cast<const T*>(p.sin) + token * p.rotary;
    T* y = static_cast<T*>(h.y) + i * p.dim;
    if (weight != nullptr && !kTransposed) {
      h.rstd[i] = norm_row(x, weight, y, p.dim, p.eps);
      x = y;
    }
    turn_head<T, kTransposed>(x, cos, sin, y, p.dim, p.rotary);
    if (weight != nullptr && kTransposed) {
      const T* input = static_cast<const T*>(h.input) + token * h.input_stride + head * p.dim;
      norm_row_backward<T>(y, nullptr, input, weight, h.rstd[i], y, dw, p.dim);
    }
  }
}

template <class T, bool kTransposed>
void apply(const RopeParams& p, const Parallel& parallel) {
  const int64_t q_rows = p.q.tokens * p.q.heads, k_rows = p.k.tokens * p.k.heads;
  parallel.ranges(q_rows + k_rows, 32768 / (p.dim + 1) + 1, [&](int64_t begin, int64_t end) {
    if (begin < q_rows) turn_heads<T, kTransposed>(p, p.q, begin, end < q_rows ? end : q_rows, nullptr);
    if (end > q_rows) turn_heads<T, kTransposed>(p, p.k, begin > q_rows ? begin - q_rows : 0, end - q_rows, nullptr);
  });
}

template <class T>
void backward_of_norms(const RopeParams& p, const Parallel& parallel) {
  const int64_t q_rows = p.q.tokens * p.q.heads, k_rows = p.k.tokens * p.k.heads;
  const int64_t q_chunks = norm_chunks(q_rows), k_chunks = norm_chunks(k_rows);
  std::vector<float> partial(size_t((q_chunks + k_chunks) * p.dim), 0.f);
  parallel.items(q_chunks + k_chunks, [&](ItemQueue& queue) {
    for (int64_t item; queue.next(item);) {
      const RopeHeads& h = item < q_chunks ? p.q : p.k;
      const int64_t begin = (item < q_chunks ? item : item - q_chunks) * kNormChunk, rows = item < q_chunks ? q_rows : k_rows;
      turn_heads<T, true>(p, h, begin, begin + kNormChunk < rows ? begin + kNormChunk : rows, partial.data() + item * p.dim);
    }
  });
  sum_chunks(partial.data(), q_chunks, p.dim, p.q.grad_weight, parallel);
  if (p.k.weight != nullptr) sum_chunks(partial.data() + q_chunks * p.dim, k_chunks, p.dim, p.k.grad_weight, parallel);
}

template <class T>
void dispatch(const RopeParams& p, const Parallel& parallel) {
  if (!p.transposed)
    apply<T, false>(p, parallel);
  else if (p.q.weight == nullptr)
    apply<T, true>(p, parallel);
  else
    backward_of_norms<T>(p, parallel);
}

}  // namespace

void rope(const RopeParams& p, const Parallel& parallel) { p.bf16 ? dispatch<bf16>(p, parallel) : dispatch<float>(p, parallel); }

}  // namespace llada::LLADA_CPU_LEVEL
