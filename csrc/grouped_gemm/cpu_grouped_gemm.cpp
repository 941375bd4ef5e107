#include <memory>
#include <vector>

#include "grouped_gemm/params.h"
#include "grouped_gemm/row_blocks.h"

#include "grouped_gemm/tiles.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

template <class T>
void forward(const GroupedGemmParams& p, const Parallel& parallel) {
  const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b);
  T* out = static_cast<T*>(p.out);
  const std::vector<RowBlock> blocks = row_blocks(p.offsets, p.groups, kBlockRows);
  const int64_t tiles = ceil_div(p.n, kTile);
  parallel.items(int64_t(blocks.size()) * tiles, [&](ItemQueue& queue) {
    float tile[kStepRows * kTile];
    for (int64_t item; queue.next(item);) {
      const RowBlock& block = blocks[size_t(item / tiles)];
      const int64_t n0 = item % tiles * kTile, n = least(kTile, p.n - n0);
      const T* weight = b + (block.expert * p.n + n0) * p.k;
      for (int64_t r = block.begin; r < block.end; r += kStepRows) {
        const int64_t m = least(kStepRows, block.end - r);
        gemm_nt(a + r * p.k, p.k, weight, p.k, m, n, p.k, tile, kTile);
        store_tile(tile, kTile, m, n, out + r * p.n + n0, p.n);
      }
    }
  });
}

// grad_a[r] = grad[r] @ b[e]
template <class T>
void backward_a(const GroupedGemmBackwardParams& p, const Parallel& parallel) {
  const T *grad = static_cast<const T*>(p.grad), *b = static_cast<const T*>(p.b);
  T* grad_a = static_cast<T*>(p.grad_a);
  const std::vector<RowBlock> blocks = row_blocks(p.offsets, p.groups, kBlockRows);
  const int64_t tiles = ceil_div(p.k, kTile);
  parallel.items(int64_t(blocks.size()) * tiles, [&](ItemQueue& queue) {
    float tile[kStepRows * kTile];
    const auto wide = std::make_unique_for_overwrite<float[]>(size_t(kStepRows * p.n));
    for (int64_t item; queue.next(item);) {
      const RowBlock& block = blocks[size_t(item / tiles)];
      const int64_t k0 = item % tiles * kTile, k = least(kTile, p.k - k0);
      for (int64_t r = block.begin; r < block.end; r += kStepRows) {
        const int64_t m = least(kStepRows, block.end - r);
        for (int64_t i = 0; i < m; ++i) widen_row(grad + (r + i) * p.n, p.n, wide.get() + i * p.n);
        product_nn(wide.get(), p.n, 1, b + block.expert * p.n * p.k + k0, p.k, m, k, p.n, tile, kTile, false);
        store_tile(tile, kTile, m, k, grad_a + r * p.k + k0, p.k);
      }
    }
  });
}

// grad_b[e][n][k] = sum over the rows of e of grad[r][n] * a[r][k]; zero for groups without rows.
template <class T>
void backward_b(const GroupedGemmBackwardParams& p, const Parallel& parallel) {
  const T *grad = static_cast<const T*>(p.grad), *a = static_cast<const T*>(p.a);
  T* grad_b = static_cast<T*>(p.grad_b);
  const int64_t tiles = ceil_div(p.n, kTile);
  parallel.items(p.groups * tiles, [&](ItemQueue& queue) {
    const auto wide = std::make_unique_for_overwrite<float[]>(size_t(kDepth * kTile));
    const auto sums = std::make_unique_for_overwrite<float[]>(size_t(kTile * p.k));
    for (int64_t item; queue.next(item);) {
      const int64_t e = item / tiles, n0 = item % tiles * kTile, n = least(kTile, p.n - n0);
      const int64_t begin = p.offsets[e], end = p.offsets[e + 1];
      T* out = grad_b + (e * p.n + n0) * p.k;
      if (begin == end) {
        std::memset(out, 0, size_t(n * p.k) * sizeof(T));
        continue;
      }
      for (int64_t r = begin; r < end; r += kDepth) {
        const int64_t depth = least(kDepth, end - r);
        for (int64_t i = 0; i < depth; ++i) widen_row(grad + (r + i) * p.n + n0, n, wide.get() + i * kTile);
        product_nn(wide.get(), 1, kTile, a + r * p.k, p.k, n, p.k, depth, sums.get(), p.k, r > begin);
      }
      store_tile(sums.get(), p.k, n, p.k, out, p.k);
    }
  });
}

template <class T>
void backward(const GroupedGemmBackwardParams& p, const Parallel& parallel) {
  if (p.grad_a != nullptr) backward_a<T>(p, parallel);
  if (p.grad_b != nullptr) backward_b<T>(p, parallel);
}

}  // namespace

void grouped_gemm(const GroupedGemmParams& p, const Parallel& parallel) {
  p.bf16 ? forward<bf16>(p, parallel) : forward<float>(p, parallel);
}

void grouped_gemm_backward(const GroupedGemmBackwardParams& p, const Parallel& parallel) {
  p.bf16 ? backward<bf16>(p, parallel) : backward<float>(p, parallel);
}

}  // namespace llada::LLADA_CPU_LEVEL
