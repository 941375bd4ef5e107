#include <memory>
#include <type_traits>
#include <vector>

#include "grouped_gemm/params.h"
#include "grouped_gemm/row_blocks.h"

#include "grouped_gemm/weight_gradient.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

// out[r][n] = sum_k a[r][k] * B_e(k, n) for the rows of every group, B_e(k, n) = b[e * stride + n * n_stride + k * k_stride].
template <class T>
void multiply_groups(const void* a, const void* b, const int32_t* offsets, int64_t groups, int64_t n, int64_t k, int64_t n_stride,
                     int64_t k_stride, void* out, const Parallel& parallel) {
  const std::vector<RowBlock> blocks = row_blocks(offsets, groups, kBlockRows);
  in_parts(blocks, n, kTile, parallel, [&](auto&& each) {
    float tile[kStepRows * kTile];
    RightOperand<T> operand;
    each([&](const RowBlock& block, int64_t begin, int64_t end) {
      for (int64_t n0 = begin; n0 < end; n0 += kTile) {
        const int64_t columns = least(kTile, end - n0);
        const T* weight = static_cast<const T*>(b) + block.expert * n * k + n0 * n_stride;
        operand.set(weight, n_stride, k_stride, columns, k, block.end - block.begin);
        for (int64_t r = block.begin; r < block.end; r += kStepRows) {
          const int64_t m = least(kStepRows, block.end - r);
          const bool ahead = r == block.begin && n0 + columns + kTile <= end;
          operand.multiply(static_cast<const T*>(a) + r * k, k, m, tile, kTile, false, ahead);
          store_tile(tile, kTile, m, columns, static_cast<T*>(out) + r * n + n0, n);
        }
      }
    });
  });
}

template <class T>
void forward(const GroupedGemmParams& p, const Parallel& parallel) {
  multiply_groups<T>(p.a, p.b, p.offsets, p.groups, p.n, p.k, p.k, 1, p.out, parallel);
}

template <class T>
void backward(const GroupedGemmBackwardParams& p, const Parallel& parallel) {
  const T *grad = static_cast<const T*>(p.grad), *a = static_cast<const T*>(p.a);
  if (p.grad_a != nullptr) multiply_groups<T>(grad, p.b, p.offsets, p.groups, p.k, p.n, 1, p.k, p.grad_a, parallel);
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
