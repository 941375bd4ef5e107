#include <memory>
#include <type_traits>
#include <vector>

#include "grouped_gemm/row_blocks.h"
#include "moe_mlp/params.h"

#include "grouped_gemm/weight_gradient.h"
#include "moe_mlp/expert_rows.h"
#include "swiglu/swiglu.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

// Experts' outputs wait in slot order for their sum over k. Panels of columns, alike in size, keep that buffer small.
constexpr int64_t kPanelElements = int64_t(32) << 20;

inline int64_t panel_columns(int64_t slots, int64_t hidden) {
  const int64_t panels = ceil_div(hidden, kPanelElements / (slots + 1) + 1);
  return ceil_div(ceil_div(hidden, panels), kTile) * kTile;
}

// For every part of every block product(block, first column, columns, worker's scratch, where in the panel, its leading dimension), then
// for every token sum(token, first column, columns, panel, leading dimension); panel by panel. Rows of a panel are slots.
template <class Element, class Scratch, class Product, class Sum>
void in_panels(const std::vector<RowBlock>& blocks, int64_t tokens, int64_t slots, int64_t hidden, const Parallel& parallel,
               Scratch&& worker_scratch, Product&& product, Sum&& sum) {
  const int64_t width = panel_columns(slots, hidden);
  const auto panel = scratch<Element>(slots * width);
  for (int64_t p0 = 0; p0 < hidden; p0 += width) {
    const int64_t columns = least(width, hidden - p0);
    in_parts(blocks, columns, kTile, parallel, [&](auto&& each) {
      auto own = worker_scratch();
      each([&](const RowBlock& block, int64_t begin, int64_t end) {
        product(block, p0 + begin, end - begin, own, panel.get() + begin, width);
      });
    });
    parallel.ranges(tokens, 4096 / columns + 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) sum(t, p0, columns, panel.get(), width);
    });
  }
}

// Row r of the sorted rows belongs to this token.
template <class Params>
inline int64_t token_of(const Params& p, int64_t r) {
  return p.permutation[r] / p.top_k;
}

// Copies the tokens' rows of x [tokens, hidden] that the sorted rows r .. r + m - 1 stand for.
template <class T, class Params>
inline void gather(const Params& p, const T* x, int64_t r, int64_t m, T* rows, int64_t ld) {
  for (int64_t i = 0; i < m; ++i) std::memcpy(rows + i * ld, x + token_of(p, r + i) * p.hidden, size_t(p.hidden) * sizeof(T));
}

// What a worker of a forward product needs: operands, and dequantised weights if they are quantised.
template <class T>
struct ForwardScratch {
  Tokens<T> tokens;
  Weights<T> first, second;
  FewRows<T> few;
  std::unique_ptr<T[]> weights;

  ForwardScratch(const ExpertWeights& w, int64_t k, int64_t columns)
      : weights(scratch<T>(w.kind == ExpertWeights::Kind::plain ? 0 : columns * k)) {}
};

// act[r] = silu(gate) * up of the sorted rows; keeps gate and up in pre_activation if it is wanted.
template <class T>
void gate_up(const MoeMlpParams& p, const std::vector<RowBlock>& blocks, T* act, const Parallel& parallel) {
  T* kept = static_cast<T*>(p.pre_activation);
  constexpr int64_t kHalf = kTile / 2;  // features at a time: as many gate and up rows
  const int64_t k = p.hidden;
  const bool plain = p.w_gate_up.kind == ExpertWeights::Kind::plain;
  in_parts(blocks, p.width, kHalf, parallel, [&](auto&& each) {
    float gate[kStepRows * kHalf], up[kStepRows * kHalf];
    const auto gathered = scratch<T>(least(kBlockRows, p.tokens * p.top_k) * k);
    ForwardScratch<T> own(p.w_gate_up, k, 2 * kHalf);
    each([&](const RowBlock& block, int64_t begin, int64_t end) {
      const auto weights = [&](int64_t row, int64_t n, int64_t beside) {
        return expert_rows(p.w_gate_up, block.expert, 2 * p.width, k, row, n, own.weights.get() + beside * k);
      };
      const int64_t rows = block.end - block.begin;
      const auto multiply_few = [&](int64_t row, int64_t n, float* out) {
        own.few.multiply(p.w_gate_up, block.expert, 2 * p.width, row, n, out, kHalf, own.weights.get());
      };
      const auto activate = [&](int64_t r, int64_t m, int64_t i0, int64_t n) {
        for (int64_t i = 0; i < m; ++i) {
          const int64_t at = (r + i) * p.width + i0;
          for_features(n, [&](int64_t j, int64_t count) {
            const Vec g = round_to<T>(load_n(gate + i * kHalf + j, count)), u = round_to<T>(load_n(up + i * kHalf + j, count));
            store_n(act + at + j, swiglu_forward<T>(g, u), count);
            if (kept == nullptr) return;
            store_n(kept + (r + i) * 2 * p.width + i0 + j, g, count);
            store_n(kept + (r + i) * 2 * p.width + p.width + i0 + j, u, count);
          });
        }
      };
      gather(p, static_cast<const T*>(p.x), block.begin, rows, gathered.get(), k);
      own.tokens.set(gathered.get(), k, rows, k);
      if (rows < kPackTokensFrom<T>) own.few.set(p.w_gate_up, gathered.get(), rows, k);
      for (int64_t i0 = begin; i0 < end; i0 += kHalf) {
        const int64_t n = least(kHalf, end - i0);
        if (rows < kPackTokensFrom<T>) {
          for (int64_t j = 0; j < n; j += kDotColumns) {  // two streams of weights, each in the order of memory
            const int64_t c = least(kDotColumns, n - j);
            multiply_few(i0 + j, c, gate + j);
            multiply_few(p.width + i0 + j, c, up + j);
          }
          activate(block.begin, rows, i0, n);
          continue;
        }
        own.first.set(weights(i0, n, 0), k, n, own.tokens);
        // The first is packed by now, or both are used as they lie there.
        own.second.set(weights(p.width + i0, n, own.tokens.packed() ? kHalf : 0), k, n, own.tokens);
        const bool ahead = plain && i0 + n + kHalf <= end;
        for (int64_t r = 0; r < rows; r += kStepRows) {
          const int64_t m = least(kStepRows, rows - r);
          own.first.multiply(own.tokens, r, m, gate, kHalf, ahead);
          own.second.multiply(own.tokens, r, m, up, kHalf, ahead);
          activate(block.begin + r, m, i0, n);
        }
      }
    });
  });
}

template <class T>
void forward(const MoeMlpParams& p, const Parallel& parallel) {
  const int64_t slots = p.tokens * p.top_k, k = p.width;
  const bool plain = p.w_down.kind == ExpertWeights::Kind::plain;
  const std::vector<RowBlock> blocks = row_blocks(p.offsets, p.experts, kBlockRows);
  const auto act = scratch<T>(slots * k);
  gate_up<T>(p, blocks, act.get(), parallel);
  const auto down = [&](const RowBlock& block, int64_t h0, int64_t columns, ForwardScratch<T>& own, T* panel, int64_t ld) {
    float tile[kStepRows * kTile];
    const int64_t rows = block.end - block.begin;
    const auto weights = [&](int64_t row, int64_t n) {
      return expert_rows(p.w_down, block.expert, p.hidden, k, row, n, own.weights.get());
    };
    const auto place = [&](int64_t r, int64_t m, int64_t j, int64_t n) {
      for (int64_t i = 0; i < m; ++i) store_tile(tile + i * kTile, kTile, 1, n, panel + p.permutation[r + i] * ld + j, ld);
    };
    own.tokens.set(act.get() + block.begin * k, k, rows, k);
    if (rows < kPackTokensFrom<T>) own.few.set(p.w_down, act.get() + block.begin * k, rows, k);
    for (int64_t j = 0; j < columns; j += kTile) {
      const int64_t n = least(kTile, columns - j);
      if (rows < kPackTokensFrom<T>) {
        own.few.multiply(p.w_down, block.expert, p.hidden, h0 + j, n, tile, kTile, own.weights.get());
        place(block.begin, rows, j, n);
        continue;
      }
      own.first.set(weights(h0 + j, n), k, n, own.tokens);
      for (int64_t r = 0; r < rows; r += kStepRows) {
        const int64_t m = least(kStepRows, rows - r);
        own.first.multiply(own.tokens, r, m, tile, kTile, plain && j + n + kTile <= columns);
        place(block.begin + r, m, j, n);
      }
    }
  };
  const auto sum = [&](int64_t token, int64_t h0, int64_t columns, const T* panel, int64_t ld) {
    const T* rows = panel + token * p.top_k * ld;
    T* out = static_cast<T*>(p.out) + token * p.hidden + h0;
    for_features(columns, [&](int64_t i, int64_t n) {
      Vec total = load_n(rows + i, n) * p.weights[token * p.top_k];
      for (int64_t s = 1; s < p.top_k; ++s) total += load_n(rows + s * ld + i, n) * p.weights[token * p.top_k + s];
      store_n(out + i, total, n);
    });
  };
  const auto worker_scratch = [&] { return ForwardScratch<T>(p.w_down, k, kTile); };
  in_panels<T>(blocks, p.tokens, slots, p.hidden, parallel, worker_scratch, down, sum);
}

// With d = grad_out @ w_down of a row: grad_weight = d . act, grad_act = weight * d, and from it the gradients of gate and up.
// weighted_act = weight * act is what grad_w_down needs.
template <class T>
void activation_gradients(const MoeMlpBackwardParams& p, const std::vector<RowBlock>& blocks, T* grad_gate_up, int64_t ld_grad,
                          T* weighted_act, const Parallel& parallel) {
  const T* kept = static_cast<const T*>(p.pre_activation);
  const int64_t tiles = ceil_div(p.width, kTile), slots = p.tokens * p.top_k;
  const auto dots = scratch<float>(tiles * slots);  // d . act of each tile's features
  in_parts(blocks, p.width, kTile, parallel, [&](auto&& each) {
    const int64_t ld = p.hidden + 64 / int64_t(sizeof(T));
    const auto rows = scratch<T>(least(kBlockRows, slots) * ld);
    ColumnProduct<T> product;
    each([&](const RowBlock& block, int64_t begin, int64_t end) {
      gather(p, static_cast<const T*>(p.grad_out), block.begin, block.end - block.begin, rows.get(), ld);
      const auto gradients = [&](int64_t r, int64_t i0, int64_t n, const float* grads) {
        const int64_t slot = p.permutation[r], at = r * 2 * p.width + i0;
        const float routing_weight = p.weights[slot];
        Vec dot{};
        for_features(n, [&](int64_t j, int64_t count) {
          const Vec g = load_n(kept + at + j, count), u = load_n(kept + at + p.width + j, count);
          const Vec act = round_to<T>(swiglu_forward<T>(g, u)), grad = load_n(grads + j, count);
          dot += act * grad;
          store_n(weighted_act + r * p.width + i0 + j, act * routing_weight, count);
          const SwigluGradients out = swiglu_gradients(grad * routing_weight, g, u);
          store_n(grad_gate_up + r * ld_grad + i0 + j, out.gate, count);
          store_n(grad_gate_up + r * ld_grad + p.width + i0 + j, out.up, count);
        });
        dots[size_t(i0 / kTile * slots + slot)] = reduce_add(dot);
      };
      product.multiply(rows.get(), ld, block.end - block.begin, static_cast<const T*>(p.w_down) + block.expert * p.hidden * p.width + begin,
                       p.width, end - begin, p.hidden, [&](int64_t r, int64_t m, int64_t i0, int64_t columns, const float* c, int64_t ldc) {
                         for (int64_t i = 0; i < m; ++i)
                           for (int64_t j = 0; j < columns; j += kTile)
                             gradients(block.begin + r + i, begin + i0 + j, least(kTile, columns - j), c + i * ldc + j);
                       });
    });
  });
  parallel.ranges(slots, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      float sum = 0.f;
      for (int64_t t = 0; t < tiles; ++t) sum += dots[size_t(t * slots + s)];
      p.grad_weights[s] = sum;
    }
  });
}

template <class T>
void backward(const MoeMlpBackwardParams& p, const Parallel& parallel) {
  const int64_t slots = p.tokens * p.top_k;
  const T *x = static_cast<const T*>(p.x), *grad_out = static_cast<const T*>(p.grad_out);
  const std::vector<RowBlock> blocks = row_blocks(p.offsets, p.experts, kBlockRows);
  const int64_t ld_grad = 2 * p.width + 64 / int64_t(sizeof(T));
  const auto grad_gate_up = scratch<T>(slots * ld_grad), weighted_act = scratch<T>(slots * p.width);
  activation_gradients<T>(p, blocks, grad_gate_up.get(), ld_grad, weighted_act.get(), parallel);
  if (p.grad_w_down != nullptr)
    weight_gradient(
        p.offsets, p.experts, p.hidden, p.width, static_cast<T*>(p.grad_w_down), parallel,
        [&](int64_t r) { return grad_out + token_of(p, r) * p.hidden; }, [&](int64_t r) { return weighted_act.get() + r * p.width; });
  if (p.grad_w_gate_up != nullptr)
    weight_gradient(
        p.offsets, p.experts, 2 * p.width, p.hidden, static_cast<T*>(p.grad_w_gate_up), parallel,
        [&](int64_t r) { return grad_gate_up.get() + r * ld_grad; }, [&](int64_t r) { return x + token_of(p, r) * p.hidden; });
  if (p.grad_x == nullptr) return;
  const auto to_x = [&](const RowBlock& block, int64_t h0, int64_t columns, ColumnProduct<T>& product, float* panel, int64_t ld) {
    product.multiply(grad_gate_up.get() + block.begin * ld_grad, ld_grad, block.end - block.begin,
                     static_cast<const T*>(p.w_gate_up) + block.expert * 2 * p.width * p.hidden + h0, p.hidden, columns, 2 * p.width,
                     [&](int64_t r, int64_t m, int64_t j, int64_t n, const float* c, int64_t ldc) {
                       for (int64_t i = 0; i < m; ++i)
                         store_tile(c + i * ldc, ldc, 1, n, panel + p.permutation[block.begin + r + i] * ld + j, ld);
                     });
  };
  const auto sum = [&](int64_t token, int64_t h0, int64_t columns, const float* panel, int64_t ld) {
    const float* rows = panel + token * p.top_k * ld;
    T* out = static_cast<T*>(p.grad_x) + token * p.hidden + h0;
    for_features(columns, [&](int64_t i, int64_t n) {
      Vec total = load_n(rows + i, n);
      for (int64_t k = 1; k < p.top_k; ++k) total += load_n(rows + k * ld + i, n);
      store_n(out + i, total, n);
    });
  };
  in_panels<float>(blocks, p.tokens, slots, p.hidden, parallel, [] { return ColumnProduct<T>(); }, to_x, sum);
}

}  // namespace

void moe_mlp(const MoeMlpParams& p, const Parallel& parallel) { p.bf16 ? forward<bf16>(p, parallel) : forward<float>(p, parallel); }

void moe_mlp_backward(const MoeMlpBackwardParams& p, const Parallel& parallel) {
  p.bf16 ? backward<bf16>(p, parallel) : backward<float>(p, parallel);
}

}  // namespace llada::LLADA_CPU_LEVEL
