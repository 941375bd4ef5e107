#include <memory>
#include <vector>

#include "lm_loss/params.h"

#include "common/gemm.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

// Logits exist in tiles of kRows x kColumns; the vocabulary is split in a way that depends on nothing but its size, and partial
// results are merged in order: the outcome does not depend on the number of threads.
constexpr int64_t kRows = 32, kColumns = 64;
constexpr int64_t kItemTokens = 256;    // forward: one item's tokens, which share the tile of weights in the cache
constexpr int64_t kSplit = 2048;        // vocabulary of one item (forward) and of one chunk (backward)
constexpr int64_t kChunkTokens = 1024;  // backward: gradients of kChunkTokens x kSplit logits exist at once
constexpr int64_t kGradRows = 48, kGradColumns = 256, kGradDepth = 256;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The kept rows of hidden, without gaps.
template <class T>
struct KeptRows {
  KeptRows(const void* hidden, const int64_t* index, int64_t kept, int64_t tokens, int64_t width) {
    rows = static_cast<const T*>(hidden);
    if (kept == tokens) return;
    copy = std::make_unique_for_overwrite<T[]>(size_t(kept * width));
    for (int64_t i = 0; i < kept; ++i) std::memcpy(copy.get() + i * width, rows + index[i] * width, size_t(width) * sizeof(T));
    rows = copy.get();
  }
  std::unique_ptr<T[]> copy;
  const T* rows;
};

// Of one token over a part of the vocabulary. With a = (z - max) / T: tempered = sum e^a, weighted = sum e^a * a.
struct Partial {
  float max = -std::numeric_limits<float>::infinity();
  int64_t argmax = 0;
  double sum = 0, tempered = 0, weighted = 0;
};

// Refers the sums to a larger maximum.
inline void raise_max(Partial& a, float max, double inverse_temperature) {
  if (a.sum > 0) {
    const double down = double(a.max) - double(max), tempered_down = down * inverse_temperature;
    const double scale = std::exp(tempered_down);
    a.sum *= std::exp(down);
    a.weighted = scale * (a.weighted + tempered_down * a.tempered);
    a.tempered *= scale;
  }
  a.max = max;
}

// Merges b, whose part lies behind that of a.
inline void merge(Partial& a, Partial b, double inverse_temperature) {
  if (b.max > a.max) {
    raise_max(a, b.max, inverse_temperature);
    a.argmax = b.argmax;
  } else {
    raise_max(b, a.max, inverse_temperature);
  }
  a.sum += b.sum;
  a.tempered += b.tempered;
  a.weighted += b.weighted;
}

// Adds one row of a tile of n > 0 columns, the first of which has the id `first`.
template <bool kTempered>
void add_row(Partial& total, const float* z, int64_t n, int64_t first, float inverse_temperature) {
  const float lowest = -std::numeric_limits<float>::infinity();
  const int64_t main = n / kLanes * kLanes;
  const Vec tail = load_partial(z + main, n - main, lowest);
  Vec largest = tail;
  for (int64_t i = 0; i < main; i += kLanes) largest = vmax(largest, load(z + i));
  const float row_max = reduce_max(largest);
  if (row_max > total.max) {
    raise_max(total, row_max, inverse_temperature);
    total.argmax = 0;
    while (total.argmax < n - 1 && z[total.argmax] != row_max) ++total.argmax;
    total.argmax += first;
  }
  Vec sum{}, tempered{}, weighted{};
  const auto add = [&](Vec v) {
    Vec a = v - total.max;
    sum += vexp(a);
    if constexpr (kTempered) {
      a = vmax(a * inverse_temperature, splat(-1e4f));  // finite: -inf times e^-inf is no number
      const Vec e = vexp(a);
      tempered += e;
      weighted += e * a;
    }
  };
  for (int64_t i = 0; i < main; i += kLanes) add(load(z + i));
  if (main < n) add(tail);
  total.sum += reduce_add(sum);
  if constexpr (kTempered) {
    total.tempered += reduce_add(tempered);
    total.weighted += reduce_add(weighted);
  }
}

template <class T, bool kTempered>
void forward(const LmLossParams& p, const Parallel& parallel) {
  const KeptRows<T> hidden(p.hidden, p.index, p.kept, p.tokens, p.width);
  const T* lm_head = static_cast<const T*>(p.lm_head);
  const int64_t splits = ceil_div(p.vocab, kSplit), groups = ceil_div(p.kept, kItemTokens);
  const float inverse_temperature = 1.f / p.temperature;
  std::vector<Partial> partials(size_t(splits * p.kept));
  std::vector<float> picked(size_t(p.kept), 0.f);
  parallel.items(splits * groups, [&](ItemQueue& queue) {
    float tile[kRows * kColumns];
    for (int64_t item; queue.next(item);) {
      const int64_t split = item / groups, begin = item % groups * kItemTokens, end = least(p.kept, begin + kItemTokens);
      const int64_t last = least(p.vocab, (split + 1) * kSplit);
      for (int64_t v = split * kSplit; v < last; v += kColumns) {
        const int64_t n = least(kColumns, last - v);
        for (int64_t t = begin; t < end; t += kRows) {
          const int64_t m = least(kRows, end - t);
          gemm_nt(hidden.rows + t * p.width, p.width, lm_head + v * p.width, p.width, m, n, p.width, tile, kColumns);
          for (int64_t i = 0; i < m; ++i) {
            const float* z = tile + i * kColumns;
            add_row<kTempered>(partials[size_t(split * p.kept + t + i)], z, n, v, inverse_temperature);
            const int64_t target = p.targets[p.index[t + i]] - v;
            if (0 <= target && target < n) picked[size_t(t + i)] = z[target];
          }
        }
      }
    }
  });
  parallel.ranges(p.kept, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Partial total = partials[size_t(i)];
      for (int64_t s = 1; s < splits; ++s) merge(total, partials[size_t(s * p.kept + i)], inverse_temperature);
      const int64_t token = p.index[i];
      const double log_sum = std::log(total.sum);
      double tempered_log_sum = 0, entropy = 0;
      if constexpr (kTempered) {
        tempered_log_sum = std::log(total.tempered);
        entropy = tempered_log_sum - total.weighted / total.tempered;
      }
      p.token_losses[token] = float(log_sum + (double(total.max) - double(picked[size_t(i)])));
      p.correct[token] = total.argmax == p.targets[token];
      p.statistics[token] = {total.max, float(log_sum), float(tempered_log_sum), float(entropy)};
      if (p.entropy != nullptr && (p.entropy_of == EntropyOf::all || p.correct[token])) p.entropy[token] = float(entropy);
    }
  });
  double loss = 0;
  for (int64_t i = 0; i < p.kept; ++i) loss += double(p.weights[p.index[i]]) * double(p.token_losses[p.index[i]]);
  *p.loss = float(loss);
}

// d loss / d logits of one row of a tile, in place. The entropy's derivative is -p (log p + H) / T, p the tempered probability.
void logits_gradient(float* z, int64_t n, const TokenStatistics& s, float grad, float grad_entropy, float inverse_temperature) {
  const float entropy_factor = -grad_entropy * inverse_temperature;
  const auto derivative = [&](Vec v) {
    const Vec shifted = v - s.max;
    Vec d = grad * vexp(shifted - s.log_sum);
    if (grad_entropy != 0.f) {
      const Vec log_p = shifted * inverse_temperature - s.tempered_log_sum;
      d += entropy_factor * vexp(log_p) * (log_p + s.entropy);
    }
    return d;
  };
  const int64_t main = n / kLanes * kLanes;
  for (int64_t i = 0; i < main; i += kLanes) store(z + i, derivative(load(z + i)));
  if (main < n) store_partial(z + main, derivative(load_partial(z + main, n - main)), n - main);
}

// c (+)= A * B as gemm_nn, the depth in steps: a step's rows of B stay in the cache.
template <class T>
void accumulate_product(const float* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t m, int64_t n, int64_t k, float* c,
                        int64_t ldc) {
  for (int64_t i = 0; i < k; i += kGradDepth)
    gemm_nn(a + i * a_k, a_row, a_k, b + i * ldb, ldb, m, n, least(kGradDepth, k - i), c, ldc, true);
}

// c (+)= A * B over the whole of [rows, columns], in tiles by the workers.
template <class T>
void parallel_product(const Parallel& parallel, const float* a, int64_t a_row, int64_t a_k, const T* b, int64_t columns, int64_t rows,
                      int64_t depth, float* c) {
  const int64_t across = ceil_div(columns, kGradColumns);
  parallel.items(ceil_div(rows, kGradRows) * across, [&](ItemQueue& queue) {
    for (int64_t item; queue.next(item);) {
      const int64_t row = item / across * kGradRows, column = item % across * kGradColumns;
      accumulate_product(a + row * a_row, a_row, a_k, b + column, columns, least(kGradRows, rows - row),
                         least(kGradColumns, columns - column), depth, c + row * columns + column, columns);
    }
  });
}

template <class T>
void round_row(const float* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_float<T>(from[i]);
}

// Chunk by chunk: the gradients of the chunk's logits, then their products with lm_head and with hidden. Every element of a result
// belongs to one item of work and its chunks are added in order.
template <class T>
void backward(const LmLossBackwardParams& p, const Parallel& parallel) {
  const KeptRows<T> hidden(p.hidden, p.index, p.kept, p.tokens, p.width);
  const T* lm_head = static_cast<const T*>(p.lm_head);
  const int64_t width = p.width, chunk_tokens = least(kChunkTokens, p.kept), chunk_vocab = least(kSplit, p.vocab);
  const float inverse_temperature = 1.f / p.temperature;
  std::vector<float> grad_logits(size_t(chunk_tokens * chunk_vocab));
  std::vector<float> grad_rows(p.grad_hidden != nullptr ? size_t(p.kept * width) : 0, 0.f);
  constexpr bool kDirect = std::is_same_v<T, float>;  // lm_head's gradient is summed where it belongs
  std::vector<float> sums(p.grad_lm_head != nullptr && !kDirect ? size_t(chunk_vocab * width) : 0);
  for (int64_t v0 = 0; v0 < p.vocab; v0 += chunk_vocab) {
    const int64_t columns = least(chunk_vocab, p.vocab - v0);
    T* const grad_lm_head = static_cast<T*>(p.grad_lm_head) + (p.grad_lm_head != nullptr ? v0 * width : 0);
    float* const head_sums = kDirect ? reinterpret_cast<float*>(grad_lm_head) : sums.data();
    if (p.grad_lm_head != nullptr) std::memset(head_sums, 0, size_t(columns * width) * sizeof(float));
    for (int64_t t0 = 0; t0 < p.kept; t0 += chunk_tokens) {
      const int64_t tokens = least(chunk_tokens, p.kept - t0), across = ceil_div(columns, kColumns);
      parallel.items(ceil_div(tokens, kRows) * across, [&](ItemQueue& queue) {
        for (int64_t item; queue.next(item);) {
          const int64_t t = t0 + item / across * kRows, m = least(kRows, t0 + tokens - t);
          const int64_t c = item % across * kColumns, n = least(kColumns, columns - c);
          float* z = grad_logits.data() + (t - t0) * columns + c;
          gemm_nt(hidden.rows + t * width, width, lm_head + (v0 + c) * width, width, m, n, width, z, columns);
          for (int64_t i = 0; i < m; ++i) {
            const int64_t token = p.index[t + i], target = p.targets[token] - v0 - c;
            const float grad = p.grad_cross_entropy[t + i], grad_entropy = p.grad_entropy != nullptr ? p.grad_entropy[t + i] : 0.f;
            logits_gradient(z + i * columns, n, p.statistics[token], grad, grad_entropy, inverse_temperature);
            if (0 <= target && target < n) z[i * columns + target] -= grad;
          }
        }
      });
      const float* z = grad_logits.data();
      if (p.grad_hidden != nullptr)
        parallel_product(parallel, z, columns, 1, lm_head + v0 * width, width, tokens, columns, grad_rows.data() + t0 * width);
      if (p.grad_lm_head != nullptr) parallel_product(parallel, z, 1, columns, hidden.rows + t0 * width, width, columns, tokens, head_sums);
    }
    if (p.grad_lm_head != nullptr && !kDirect)
      parallel.ranges(columns, 32768 / (width + 1) + 1, [&](int64_t begin, int64_t end) {
        round_row(head_sums + begin * width, grad_lm_head + begin * width, (end - begin) * width);
      });
  }
  if (p.grad_hidden == nullptr) return;
  T* grad_hidden = static_cast<T*>(p.grad_hidden);
  parallel.ranges(p.kept, 32768 / (width + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) round_row(grad_rows.data() + i * width, grad_hidden + p.index[i] * width, width);
  });
}

template <class T>
void forward(const LmLossParams& p, const Parallel& parallel) {
  p.entropy_of == EntropyOf::none ? forward<T, false>(p, parallel) : forward<T, true>(p, parallel);
}

}  // namespace

void lm_loss(const LmLossParams& p, const Parallel& parallel) { p.bf16 ? forward<bf16>(p, parallel) : forward<float>(p, parallel); }

void lm_loss_backward(const LmLossBackwardParams& p, const Parallel& parallel) {
  p.bf16 ? backward<bf16>(p, parallel) : backward<float>(p, parallel);
}

}  // namespace llada::LLADA_CPU_LEVEL
