// Gradients of grouped weights: sums over the rows of each group. Included after the standard headers.
#pragma once

#include "grouped_gemm/tiles.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

constexpr int64_t kSumRows = 256, kSumColumns = 256;  // of a work item's gradient
constexpr int64_t kSumDepth = 256;                    // rows of a group that are summed in one step
// 32-bit elements from one step's operands to the next: no power of two, which would put them all in few sets of a cache.
constexpr int64_t kSumStride = 256 + kLanes;
static_assert(kSumRows <= kSumStride && kSumColumns <= kSumStride && kSumColumns % kPanel == 0);
// Gradients of this size are in no cache when somebody reads them: written past the caches, memory is not read before it is written. 1.6 GB
// of gradients, forward and backward of 2048 tokens of the mini model: 720 -> 650 ms in fresh memory, 510 -> 500 ms in used.
constexpr int64_t kStreamedBytes = int64_t(64) << 20;

// Where sums go once they are complete, T for T; nullptr: not yet.
template <class T>
struct GradientPart {
  T* out;
  int64_t ld;
  bool streamed;
};

// out[i][c] = packed element (packed_gemm.h) of column c of the i-th of `rows` rows, or pair of rows; zeros up to whole panels.
template <class T, class Row>
inline void interleave(Row&& row, int64_t rows, int64_t columns, uint32_t* out) {
  constexpr int64_t depth = kPackedDepth<T>;
  for (int64_t r = 0; r < rows; r += depth, out += kSumStride) {
    const T *low = row(r), *high = r + depth - 1 < rows ? row(r + depth - 1) : nullptr;  // for single elements the same
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      VecU v = load_wide(low + c);
      if constexpr (depth == 2) v = v >> 16 | (high != nullptr ? load_wide(high + c) : VecU{});
      std::memcpy(out + c, &v, sizeof v);
    }
    for (; c < columns; ++c) {
      if constexpr (depth == 2) {
        out[c] = low[c].bits | (high != nullptr ? uint32_t(high[c].bits) << 16 : 0);
      } else {
        const float x = to_float(low[c]);
        std::memcpy(out + c, &x, 4);
      }
    }
    for (; c % kPanel != 0; ++c) out[c] = 0;
  }
}

// sums[m][n] (+)= sum over i < steps of left[i][m] * right[i][n], for M rows and a panel of columns.
template <int M, class T>
inline void sum_tile(const uint32_t* left, const uint32_t* right, int64_t steps, float* sums, bool accumulate, const GradientPart<T>& part,
                     int64_t columns) {
  constexpr int depth = kPackedDepth<T>;
  using Element = std::conditional_t<depth == 2, T, float>;
  Vec acc[M][2] = {};
  for (int64_t i = 0; i < steps; ++i) {
    const float* b = reinterpret_cast<const float*>(right + i * kSumStride);
    const Vec b0 = load(b), b1 = load(b + kLanes);
    const Element* a = reinterpret_cast<const Element*>(left + i * kSumStride);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      acc[m][0] = multiply_add(acc[m][0], a + m * depth, b0, std::integral_constant<int, depth>());
      acc[m][1] = multiply_add(acc[m][1], a + m * depth, b1, std::integral_constant<int, depth>());
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    float* sum = sums + m * kSumColumns;
    if (accumulate) acc[m][0] += load(sum), acc[m][1] += load(sum + kLanes);
    if (part.out == nullptr) {
      store(sum, acc[m][0]), store(sum + kLanes, acc[m][1]);
      continue;
    }
    T* out = part.out + m * part.ld;
    if (columns < kPanel) {
      T row[kPanel];
      store_both(row, acc[m][0], acc[m][1]);
      std::memcpy(out, row, size_t(columns) * sizeof(T));
    } else if (part.streamed) {
      store_streamed(out, acc[m][0], acc[m][1]);
    } else {
      store_both(out, acc[m][0], acc[m][1]);
    }
  }
}

template <int M, class T>
inline void sum_rows(int64_t m, const uint32_t* left, const uint32_t* right, int64_t steps, float* sums, bool accumulate,
                     const GradientPart<T>& part, int64_t columns) {
  if (m == M) return sum_tile<M>(left, right, steps, sums, accumulate, part, columns);
  if constexpr (M > 1) sum_rows<M - 1>(m, left, right, steps, sums, accumulate, part, columns);
}

// A worker's part of a gradient: sums over `depth` rows of a(r)[i] * b(r)[j], step by step.
template <class T>
class RowSums {
 public:
  template <class RowA, class RowB>
  void add(RowA&& a, RowB&& b, int64_t depth, int64_t rows, int64_t columns, bool accumulate, const GradientPart<T>& part) {
    if constexpr (kOnTiles<T>) {
      transpose_rows(a, depth, rows, left_.get(), kSumDepth);
      for (int64_t i = 0; i < depth; ++i) std::memcpy(right_.get() + i * columns, b(i), size_t(columns) * sizeof(T));
      operand_.set(right_.get(), 1, columns, columns, depth, rows);
      operand_.multiply(left_.get(), kSumDepth, rows, sums_.get(), kSumColumns, accumulate);
      if (part.out != nullptr) store_tile(sums_.get(), kSumColumns, rows, columns, part.out, part.ld);
    } else {
      interleave<T>(a, depth, rows, left_.get());
      interleave<T>(b, depth, columns, right_.get());
      const int64_t tiles = ceil_div(rows, kPackedRows), steps = ceil_div(depth, kPackedDepth<T>);
      for (int64_t t = 0, i = 0, end; t < tiles; ++t, i = end) {
        end = rows * (t + 1) / tiles;
        for (int64_t j = 0; j < columns; j += kPanel) {
          const GradientPart<T> to{part.out == nullptr ? nullptr : part.out + i * part.ld + j, part.ld, part.streamed};
          sum_rows<kPackedRows>(end - i, left_.get() + i, right_.get() + j, steps, sums_.get() + i * kSumColumns + j, accumulate, to,
                                columns - j);
        }
      }
    }
  }

 private:
  using Element = std::conditional_t<kOnTiles<T>, T, uint32_t>;
  std::unique_ptr<Element[]> left_ = scratch<Element>(kSumStride * kSumDepth), right_ = scratch<Element>(kSumStride * kSumDepth);
  std::unique_ptr<float[]> sums_ = scratch<float>(kSumRows * kSumColumns);
  RightOperand<T> operand_;
};

// out[e][i][j] = sum over the rows r of e of a(r)[i] * b(r)[j], a(r) a row of m elements and b(r) one of n; zero for experts
// without rows.
template <class T, class RowA, class RowB>
void weight_gradient(const int32_t* offsets, int64_t experts, int64_t m, int64_t n, T* out, const Parallel& parallel, RowA&& a, RowB&& b) {
  const int64_t tiles_m = ceil_div(m, kSumRows), tiles_n = ceil_div(n, kSumColumns);
  constexpr int64_t line = 64 / sizeof(T);
  const bool streamed =
      experts * m * n * int64_t(sizeof(T)) >= kStreamedBytes && n % line == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  parallel.items(experts * tiles_m * tiles_n, [&](ItemQueue& queue) {
    RowSums<T> sums;
    for (int64_t item; queue.next(item);) {
      const int64_t e = item / (tiles_m * tiles_n), i0 = item / tiles_n % tiles_m * kSumRows, j0 = item % tiles_n * kSumColumns;
      const int64_t rows = least(kSumRows, m - i0), columns = least(kSumColumns, n - j0), begin = offsets[e], end = offsets[e + 1];
      T* part = out + (e * m + i0) * n + j0;
      if (begin == end)
        for (int64_t i = 0; i < rows; ++i) std::memset(part + i * n, 0, size_t(columns) * sizeof(T));
      for (int64_t r = begin; r < end; r += kSumDepth) {
        const int64_t depth = least(kSumDepth, end - r);
        const bool last = r + depth == end;
        sums.add([&](int64_t i) { return a(r + i) + i0; }, [&](int64_t i) { return b(r + i) + j0; }, depth, rows, columns, r > begin,
                 {last ? part : nullptr, n, last && streamed});
      }
    }
    finish_streamed();
  });
}

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
