#include <memory>
#include <vector>

#include "grouped_gemm/row_blocks.h"
#include "moe_mlp/params.h"

#include "grouped_gemm/tiles.h"
#include "swiglu/swiglu.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

// Experts' outputs wait in slot order for their sum over k. A panel of columns at a time keeps that buffer small.
constexpr int64_t kPanelElements = int64_t(16) << 20;

inline int64_t panel_columns(int64_t slots, int64_t hidden) {
  const int64_t columns = kPanelElements / (slots + 1) / kTile * kTile;
  return least(hidden, columns < kTile ? kTile : columns);
}

template <class T>
inline auto scratch(int64_t n) {
  return std::make_unique_for_overwrite<T[]>(size_t(n));
}

// Calls product(block, h0, n, panel + column, width of the panel) for every tile of every block and then sum(token, p0, n, panel)
// for every token, panel by panel.
template <class T, class Product, class Sum>
void in_panels(const std::vector<RowBlock>& blocks, int64_t tokens, int64_t slots, int64_t hidden, const Parallel& parallel,
               Product&& product, Sum&& sum) {
  const int64_t width = panel_columns(slots, hidden);
  const auto rows = scratch<T>(slots * width);
  for (int64_t p0 = 0; p0 < hidden; p0 += width) {
    const int64_t columns = least(width, hidden - p0), tiles = ceil_div(columns, kTile);
    parallel.items(int64_t(blocks.size()) * tiles, [&](ItemQueue& queue) {
      auto worker = product();
      for (int64_t item; queue.next(item);) {
        const int64_t h0 = item % tiles * kTile;
        worker(blocks[size_t(item / tiles)], p0 + h0, least(kTile, columns - h0), rows.get() + h0, width);
      }
    });
    parallel.ranges(tokens, 4096 / columns + 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) sum(t, p0, columns, rows.get(), width);
    });
  }
}

// act[r] = silu(gate) * up of the sorted rows; keeps gate and up in pre_activation if it is wanted.
template <class T>
void gate_up(const MoeMlpParams& p, const std::vector<RowBlock>& blocks, T* act, const Parallel& parallel) {
  const T *x = static_cast<const T*>(p.x), *weights = static_cast<const T*>(p.w_gate_up);
  T* kept = static_cast<T*>(p.pre_activation);
  constexpr int64_t kHalf = kTile / 2;  // features of one work item: as many gate and up rows
  const int64_t tiles = ceil_div(p.width, kHalf);
  parallel.items(int64_t(blocks.size()) * tiles, [&](ItemQueue& queue) {
    float gate[kStepRows * kHalf], up[kStepRows * kHalf];
    const auto rows = scratch<T>(kStepRows * p.hidden);
    for (int64_t item; queue.next(item);) {
      const RowBlock& block = blocks[size_t(item / tiles)];
      const int64_t i0 = item % tiles * kHalf, n = least(kHalf, p.width - i0);
      const T* w_gate = weights + (block.expert * 2 * p.width + i0) * p.hidden;
      const T* w_up = w_gate + p.width * p.hidden;
      for (int64_t r = block.begin; r < block.end; r += kStepRows) {
        const int64_t m = least(kStepRows, block.end - r);
        for (int64_t i = 0; i < m; ++i)
          std::memcpy(rows.get() + i * p.hidden, x + p.permutation[r + i] / p.top_k * p.hidden, size_t(p.hidden) * sizeof(T));
        gemm_nt(rows.get(), p.hidden, w_gate, p.hidden, m, n, p.hidden, gate, kHalf);
        gemm_nt(rows.get(), p.hidden, w_up, p.hidden, m, n, p.hidden, up, kHalf);
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
      }
    }
  });
}

template <class T>
void forward(const MoeMlpParams& p, const Parallel& parallel) {
  const int64_t slots = p.tokens * p.top_k;
  const std::vector<RowBlock> blocks = row_blocks(p.offsets, p.experts, kBlockRows);
  const auto act = scratch<T>(slots * p.width);
  gate_up<T>(p, blocks, act.get(), parallel);
  const auto product = [&] {
    return [&](const RowBlock& block, int64_t h0, int64_t n, T* panel, int64_t ld) {
      float tile[kStepRows * kTile];
      const T* weight = static_cast<const T*>(p.w_down) + (block.expert * p.hidden + h0) * p.width;
      for (int64_t r = block.begin; r < block.end; r += kStepRows) {
        const int64_t m = least(kStepRows, block.end - r);
        gemm_nt(act.get() + r * p.width, p.width, weight, p.width, m, n, p.width, tile, kTile);
        for (int64_t i = 0; i < m; ++i) store_tile(tile + i * kTile, kTile, 1, n, panel + p.permutation[r + i] * ld, ld);
      }
    };
  };
  const auto sum = [&](int64_t token, int64_t p0, int64_t columns, const T* panel, int64_t ld) {
    const T* rows = panel + token * p.top_k * ld;
    T* out = static_cast<T*>(p.out) + token * p.hidden + p0;
    for_features(columns, [&](int64_t i, int64_t n) {
      Vec total = load_n(rows + i, n) * p.weights[token * p.top_k];
      for (int64_t k = 1; k < p.top_k; ++k) total += load_n(rows + k * ld + i, n) * p.weights[token * p.top_k + k];
      store_n(out + i, total, n);
    });
  };
  in_panels<T>(blocks, p.tokens, slots, p.hidden, parallel, product, sum);
}

// With d = grad_out @ w_down of a row: grad_weight = d . act, grad_act = weight * d, and from it the gradient of gate and up.
// weighted_act = weight * act is what grad_w_down needs.
template <class T>
void activation_gradients(const MoeMlpBackwardParams& p, T* grad_gate_up, T* weighted_act, const Parallel& parallel) {
  const T *grad_out = static_cast<const T*>(p.grad_out), *w_down = static_cast<const T*>(p.w_down);
  const T* kept = static_cast<const T*>(p.pre_activation);
  const std::vector<RowBlock> blocks = row_blocks(p.offsets, p.experts, kStepRows);
  parallel.items(int64_t(blocks.size()), [&](ItemQueue& queue) {
    const auto rows = scratch<float>(kStepRows * p.hidden), grad_act = scratch<float>(kStepRows * p.width);
    for (int64_t item; queue.next(item);) {
      const RowBlock& block = blocks[size_t(item)];
      const int64_t m = block.end - block.begin;
      for (int64_t i = 0; i < m; ++i)
        widen_row(grad_out + p.permutation[block.begin + i] / p.top_k * p.hidden, p.hidden, rows.get() + i * p.hidden);
      const T* weight = w_down + block.expert * p.hidden * p.width;
      product_nn(rows.get(), p.hidden, 1, weight, p.width, m, p.width, p.hidden, grad_act.get(), p.width, false);
      for (int64_t i = 0; i < m; ++i) {
        const int64_t r = block.begin + i, slot = p.permutation[r];
        const float routing_weight = p.weights[slot];
        const T *gate = kept + r * 2 * p.width, *up = gate + p.width;
        Vec dot{};
        for_features(p.width, [&](int64_t j, int64_t n) {
          const Vec g = load_n(gate + j, n), u = load_n(up + j, n), grad = load_n(grad_act.get() + i * p.width + j, n);
          const Vec act = round_to<T>(swiglu_forward<T>(g, u));
          dot += act * grad;
          store_n(weighted_act + r * p.width + j, act * routing_weight, n);
          const SwigluGradients out = swiglu_gradients(grad * routing_weight, g, u);
          store_n(grad_gate_up + r * 2 * p.width + j, out.gate, n);
          store_n(grad_gate_up + r * 2 * p.width + p.width + j, out.up, n);
        });
        p.grad_weights[slot] = reduce_add(dot);
      }
    }
  });
}

// out[e][m][n] = sum over the rows r of e of a(r, m) * b(r, n); zero for experts without rows. load_a(r, m0, count, dst) widens a
// part of a row; load_b(r, dst) copies a row of n elements.
template <class T, class LoadA, class LoadB>
void weight_gradient(const int32_t* offsets, int64_t experts, int64_t m, int64_t n, T* out, const Parallel& parallel, LoadA&& load_a,
                     LoadB&& load_b) {
  constexpr int64_t kRows = 64;
  const int64_t tiles = ceil_div(m, kTile);
  parallel.items(experts * tiles, [&](ItemQueue& queue) {
    const auto left = scratch<float>(kRows * kTile), sums = scratch<float>(kTile * n);
    const auto right = scratch<T>(kRows * n);
    for (int64_t item; queue.next(item);) {
      const int64_t e = item / tiles, m0 = item % tiles * kTile, count = least(kTile, m - m0);
      T* part = out + (e * m + m0) * n;
      if (offsets[e] == offsets[e + 1]) std::memset(part, 0, size_t(count * n) * sizeof(T));
      for (int64_t r = offsets[e]; r < offsets[e + 1]; r += kRows) {
        const int64_t rows = least(kRows, offsets[e + 1] - r);
        for (int64_t i = 0; i < rows; ++i) {
          load_a(r + i, m0, count, left.get() + i * kTile);
          load_b(r + i, right.get() + i * n);
        }
        gemm_nn(left.get(), 1, kTile, right.get(), n, count, n, rows, sums.get(), n, r > offsets[e]);
      }
      if (offsets[e] < offsets[e + 1]) store_tile(sums.get(), n, count, n, part, n);
    }
  });
}

template <class T>
void backward(const MoeMlpBackwardParams& p, const Parallel& parallel) {
  const int64_t slots = p.tokens * p.top_k;
  const T *x = static_cast<const T*>(p.x), *grad_out = static_cast<const T*>(p.grad_out);
  const auto grad_gate_up = scratch<T>(slots * 2 * p.width), weighted_act = scratch<T>(slots * p.width);
  activation_gradients<T>(p, grad_gate_up.get(), weighted_act.get(), parallel);
  if (p.grad_w_down != nullptr)
    weight_gradient(
        p.offsets, p.experts, p.hidden, p.width, static_cast<T*>(p.grad_w_down), parallel,
        [&](int64_t r, int64_t m0, int64_t n, float* out) { widen_row(grad_out + p.permutation[r] / p.top_k * p.hidden + m0, n, out); },
        [&](int64_t r, T* out) { std::memcpy(out, weighted_act.get() + r * p.width, size_t(p.width) * sizeof(T)); });
  if (p.grad_w_gate_up != nullptr)
    weight_gradient(
        p.offsets, p.experts, 2 * p.width, p.hidden, static_cast<T*>(p.grad_w_gate_up), parallel,
        [&](int64_t r, int64_t m0, int64_t n, float* out) { widen_row(grad_gate_up.get() + r * 2 * p.width + m0, n, out); },
        [&](int64_t r, T* out) { std::memcpy(out, x + p.permutation[r] / p.top_k * p.hidden, size_t(p.hidden) * sizeof(T)); });
  if (p.grad_x == nullptr) return;
  const std::vector<RowBlock> blocks = row_blocks(p.offsets, p.experts, kBlockRows);
  const auto product = [&] {
    return [&, wide = scratch<float>(kStepRows * 2 * p.width)](const RowBlock& block, int64_t h0, int64_t n, float* panel, int64_t ld) {
      float tile[kStepRows * kTile];
      const T* weight = static_cast<const T*>(p.w_gate_up) + block.expert * 2 * p.width * p.hidden + h0;
      for (int64_t r = block.begin; r < block.end; r += kStepRows) {
        const int64_t m = least(kStepRows, block.end - r);
        for (int64_t i = 0; i < m; ++i) widen_row(grad_gate_up.get() + (r + i) * 2 * p.width, 2 * p.width, wide.get() + i * 2 * p.width);
        product_nn(wide.get(), 2 * p.width, 1, weight, p.hidden, m, n, 2 * p.width, tile, kTile, false);
        for (int64_t i = 0; i < m; ++i) store_tile(tile + i * kTile, kTile, 1, n, panel + p.permutation[r + i] * ld, ld);
      }
    };
  };
  const auto sum = [&](int64_t token, int64_t p0, int64_t columns, const float* panel, int64_t ld) {
    const float* rows = panel + token * p.top_k * ld;
    T* out = static_cast<T*>(p.grad_x) + token * p.hidden + p0;
    for_features(columns, [&](int64_t i, int64_t n) {
      Vec total = load_n(rows + i, n);
      for (int64_t k = 1; k < p.top_k; ++k) total += load_n(rows + k * ld + i, n);
      store_n(out + i, total, n);
    });
  };
  in_panels<float>(blocks, p.tokens, slots, p.hidden, parallel, product, sum);
}

}  // namespace

void moe_mlp(const MoeMlpParams& p, const Parallel& parallel) { p.bf16 ? forward<bf16>(p, parallel) : forward<float>(p, parallel); }

void moe_mlp_backward(const MoeMlpBackwardParams& p, const Parallel& parallel) {
  p.bf16 ? backward<bf16>(p, parallel) : backward<float>(p, parallel);
}

}  // namespace llada::LLADA_CPU_LEVEL
