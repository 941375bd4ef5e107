#include <algorithm>
#include <memory>
#include <vector>

#include "lm_loss/params.h"

#include "grouped_gemm/tiles.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

// Logits exist in tiles of kStepRows tokens by tile_columns() ids; the vocabulary is split in a way that depends on sizes only, and
// partial results are merged in order: the outcome does not depend on the number of threads.
constexpr int64_t kItemTokens = 256;      // forward: tokens of one item, which share a packed tile of lm_head
constexpr int64_t kSplit = 2048;          // forward: ids of one item
constexpr int64_t kMaxColumns = 256;      // wide tiles spread the cost of a row's reductions
constexpr int64_t kPackedTile = 1 << 17;  // elements of a packed tile: half of a cache of 1 MiB in fp32
constexpr int64_t kChunk = 1 << 21;       // backward: gradients of so many logits exist at once, of 256 to kSplit ids and all tokens
constexpr int64_t kDepth = 512;           // backward: summed at once, so that fp32 sums of thousands stay exact enough

inline int64_t tile_columns(int64_t width) {
  const int64_t columns = kPackedTile / (width + 1) / kTile * kTile;
  return columns < kTile ? kTile : least(columns, kMaxColumns);
}

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
  const float shift = std::max(total.max, std::numeric_limits<float>::lowest());  // finite where all logits so far are -inf
  const auto add = [&](Vec v) {
    Vec a = v - shift;
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
  const int64_t splits = ceil_div(p.vocab, kSplit), groups = ceil_div(p.kept, kItemTokens), columns = tile_columns(p.width);
  const float inverse_temperature = 1.f / p.temperature;
  std::vector<Partial> partials(size_t(splits * p.kept));
  std::vector<float> picked(size_t(p.kept), 0.f);
  parallel.items(splits * groups, [&](ItemQueue& queue) {
    const auto tile = scratch<float>(kStepRows * columns);
    Tokens<T> tokens;
    Weights<T> weights;
    for (int64_t item; queue.next(item);) {
      const int64_t split = item / groups, begin = item % groups * kItemTokens, end = least(p.kept, begin + kItemTokens);
      const int64_t last = least(p.vocab, (split + 1) * kSplit);
      tokens.set(hidden.rows + begin * p.width, p.width, end - begin, p.width);
      for (int64_t v = split * kSplit; v < last; v += columns) {
        const int64_t n = least(columns, last - v);
        weights.set(lm_head + v * p.width, p.width, n, tokens);
        for (int64_t t = begin; t < end; t += kStepRows) {
          const int64_t m = least(kStepRows, end - t);
          weights.multiply(tokens, t - begin, m, tile.get(), columns, v + n + columns <= last);
          for (int64_t i = 0; i < m; ++i) {
            const float* z = tile.get() + i * columns;
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

// Gradients of the logits of a chunk of ids, rounded to T, as they lie [kept, ids] and transposed [ids, kept].
template <class T>
struct LogitGradients {
  LogitGradients(int64_t kept, int64_t ids) : as_is(scratch<T>(kept * ids)), transposed(scratch<T>(kept * ids)) {}
  std::unique_ptr<T[]> as_is, transposed;
};

template <class T>
void chunk_gradients(const LmLossBackwardParams& p, const T* hidden, int64_t v0, int64_t ids, LogitGradients<T>& out,
                     const Parallel& parallel) {
  const T* lm_head = static_cast<const T*>(p.lm_head) + v0 * p.width;
  const int64_t columns = tile_columns(p.width), across = ceil_div(ids, columns);
  const float inverse_temperature = 1.f / p.temperature;
  parallel.items(across * ceil_div(p.kept, kItemTokens), [&](ItemQueue& queue) {
    const auto tile = scratch<float>(kStepRows * columns);
    Tokens<T> tokens;
    Weights<T> weights;
    for (int64_t item; queue.next(item);) {
      const int64_t c = item % across * columns, n = least(columns, ids - c);
      const int64_t begin = item / across * kItemTokens, end = least(p.kept, begin + kItemTokens);
      tokens.set(hidden + begin * p.width, p.width, end - begin, p.width);
      weights.set(lm_head + c * p.width, p.width, n, tokens);
      for (int64_t t = begin; t < end; t += kStepRows) {
        const int64_t m = least(kStepRows, end - t);
        weights.multiply(tokens, t - begin, m, tile.get(), columns);
        for (int64_t i = 0; i < m; ++i) {
          float* z = tile.get() + i * columns;
          const int64_t token = p.index[t + i], target = p.targets[token] - v0 - c;
          const float grad = p.grad_cross_entropy[t + i], grad_entropy = p.grad_entropy != nullptr ? p.grad_entropy[t + i] : 0.f;
          logits_gradient(z, n, p.statistics[token], grad, grad_entropy, inverse_temperature);
          if (0 <= target && target < n) z[target] -= grad;
        }
        T* rows = out.as_is.get() + t * ids + c;
        store_tile(tile.get(), columns, m, n, rows, ids);
        if (p.grad_lm_head != nullptr)
          transpose_rows([&](int64_t i) { return rows + i * ids; }, m, n, out.transposed.get() + c * p.kept + t, p.kept);
      }
    }
  });
}

// Chunk by chunk: the gradients of the chunk's logits, then their products with lm_head and with hidden. Every element of a result
// belongs to one item of work and its chunks are added in order.
template <class T>
void backward(const LmLossBackwardParams& p, const Parallel& parallel) {
  const KeptRows<T> hidden(p.hidden, p.index, p.kept, p.tokens, p.width);
  const T* lm_head = static_cast<const T*>(p.lm_head);
  const int64_t width = p.width, kept = p.kept;
  const int64_t chunk = least(p.vocab, least(kSplit, std::max(kMaxColumns, kChunk / (kept + 1) / kTile * kTile)));
  std::vector<float> grad_rows(p.grad_hidden != nullptr ? size_t(kept * width) : 0, 0.f);
  LogitGradients<T> gradients(kept, chunk);
  const int64_t tiles = ceil_div(width, kTile), tiles_hidden = p.grad_hidden != nullptr ? tiles : 0;
  for (int64_t v0 = 0; v0 < p.vocab; v0 += chunk) {
    const int64_t ids = least(chunk, p.vocab - v0);
    chunk_gradients(p, hidden.rows, v0, ids, gradients, parallel);
    parallel.items(tiles_hidden + (p.grad_lm_head != nullptr ? tiles : 0), [&](ItemQueue& queue) {
      const auto sums = scratch<float>(p.grad_lm_head != nullptr ? ids * kTile : 0);
      RightOperand<T> operand;
      for (int64_t item; queue.next(item);) {
        if (item < tiles_hidden) {
          const int64_t column = item * kTile;
          for (int64_t c = 0; c < ids; c += kDepth) {
            operand.set(lm_head + (v0 + c) * width + column, width, least(kTile, width - column), least(kDepth, ids - c), kept);
            operand.multiply(gradients.as_is.get() + c, ids, kept, grad_rows.data() + column, width, true);
          }
          continue;
        }
        const int64_t column = (item - tiles_hidden) * kTile, n = least(kTile, width - column);
        if (kept == 0) std::fill(sums.get(), sums.get() + ids * kTile, 0.f);
        for (int64_t t = 0; t < kept; t += kDepth) {
          operand.set(hidden.rows + t * width + column, width, n, least(kDepth, kept - t), ids);
          operand.multiply(gradients.transposed.get() + t, kept, ids, sums.get(), kTile, t > 0);
        }
        store_tile(sums.get(), kTile, ids, n, static_cast<T*>(p.grad_lm_head) + v0 * width + column, width);
      }
    });
  }
  if (p.grad_hidden == nullptr) return;
  T* grad_hidden = static_cast<T*>(p.grad_hidden);
  parallel.ranges(kept, 32768 / (width + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      store_tile(grad_rows.data() + i * width, width, 1, width, grad_hidden + p.index[i] * width, width);
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
