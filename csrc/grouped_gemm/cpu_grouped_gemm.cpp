#include <memory>
#include <type_traits>
#include <vector>

#include "grouped_gemm/params.h"
#include "grouped_gemm/row_blocks.h"

#include "grouped_gemm/weight_gradient.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

template <class T>
void forward(const GroupedGemmParams& p, const Parallel& parallel) {
  const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b);
  in_parts(row_blocks(p.offsets, p.groups, kBlockRows), p.n, kTile, parallel, [&](auto&& each) {
    float tile[kStepRows * kTile];
    Tokens<T> tokens;
    Weights<T> weights;
    each([&](const RowBlock& block, int64_t begin, int64_t end) {
      const int64_t rows = block.end - block.begin;
      tokens.set(a + block.begin * p.k, p.k, rows, p.k);
      for (int64_t n0 = begin; n0 < end; n0 += kTile) {
        const int64_t columns = least(kTile, end - n0);
        weights.set(b + (block.expert * p.n + n0) * p.k, p.k, columns, tokens);
        for (int64_t r = 0; r < rows; r += kStepRows) {
          const int64_t m = least(kStepRows, rows - r);
          weights.multiply(tokens, r, m, tile, kTile, n0 + columns + kTile <= end);
          store_tile(tile, kTile, m, columns, static_cast<T*>(p.out) + (block.begin + r) * p.n + n0, p.n);
        }
      }
    });
  });
}

// grad_a[r] = grad[r] @ b[e]
template <class T>
void rows_gradient(const GroupedGemmBackwardParams& p, const Parallel& parallel) {
  const T *grad = static_cast<const T*>(p.grad), *b = static_cast<const T*>(p.b);
  in_parts(row_blocks(p.offsets, p.groups, kBlockRows), p.k, kTile, parallel, [&](auto&& each) {
    ColumnProduct<T> product;
    each([&](const RowBlock& block, int64_t begin, int64_t end) {
      product.multiply(grad + block.begin * p.n, p.n, block.end - block.begin, b + block.expert * p.n * p.k + begin, p.k, end - begin, p.n,
                       [&](int64_t r, int64_t m, int64_t j, int64_t n, const float* c, int64_t ldc) {
                         store_tile(c, ldc, m, n, static_cast<T*>(p.grad_a) + (block.begin + r) * p.k + begin + j, p.k);
                       });
    });
  });
}

template <class T>
void backward(const GroupedGemmBackwardParams& p, const Parallel& parallel) {
  const T *grad = static_cast<const T*>(p.grad), *a = static_cast<const T*>(p.a);
  if (p.grad_a != nullptr) rows_gradient<T>(p, parallel);
  if (p.grad_b != nullptr)
    weight_gradient(
        p.offsets, p.groups, p.n, p.k, static_cast<T*>(p.grad_b), parallel, [&](int64_t r) { return grad + r * p.n; },
        [&](int64_t r) { return a + r * p.k; });
}

}  // namespace

void grouped_gemm(const GroupedGemmParams& p, const Parallel& parallel) {
  p.bf16 ? forward<bf16>(p, parallel) : forward<float>(p, parallel);
}

void grouped_gemm_backward(const GroupedGemmBackwardParams& p, const Parallel& parallel) {
  p.bf16 ? backward<bf16>(p, parallel) : backward<float>(p, parallel);
}

}  // namespace llada::LLADA_CPU_LEVEL
