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
    if constexpr (depth == 2)
      for (; high != nullptr && c + kPanel <= columns; c += kPanel) pair_rows(low + c, high + c, out + c);
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

// A worker's part of a gradient: sums over `depth` rows of a(r)[i] * b(r)[j], step by step. What is left is set once for many columns.
template <class T>
class RowSums {
 public:
  template <class Row>
  void set_left(Row&& a, int64_t depth, int64_t rows) {
    depth_ = depth, rows_ = rows;
    interleave<T>(a, depth, rows, left_.get());
  }
  template <class Row>
  void add(Row&& b, int64_t columns, bool accumulate, const GradientPart<T>& part) {
    interleave<T>(b, depth_, columns, right_.get());
    const int64_t rows = rows_, tiles = ceil_div(rows, kPackedRows), steps = ceil_div(depth_, kPackedDepth<T>);
    for (int64_t t = 0, i = 0, end; t < tiles; ++t, i = end) {
      end = rows * (t + 1) / tiles;
      for (int64_t j = 0; j < columns; j += kPanel) {
        const GradientPart<T> to{part.out == nullptr ? nullptr : part.out + i * part.ld + j, part.ld, part.streamed};
        sum_rows<kPackedRows>(end - i, left_.get() + i, right_.get() + j, steps, sums_.get() + i * kSumColumns + j, accumulate, to,
                              columns - j);
      }
    }
  }

 private:
  std::unique_ptr<uint32_t[]> left_ = scratch<uint32_t>(kSumStride * kSumDepth), right_ = scratch<uint32_t>(kSumStride * kSumDepth);
  std::unique_ptr<float[]> sums_ = scratch<float>(kSumRows * kSumColumns);
  int64_t depth_ = 0, rows_ = 0;
};

#if defined(LLADA_MATRIX_TILES)
// On tiles: interleaved rows of b are right operands as they lie, those of a left operands once their pairs are transposed.
template <>
class RowSums<bf16> {
 public:
  template <class Row>
  void set_left(Row&& a, int64_t depth, int64_t rows) {
    depth_ = depth, rows_ = rows;
    interleave_steps(a, rows, pairs_.get());
    transpose_rows([&](int64_t r) { return pairs_.get() + r * kSumStride; }, steps() * kPairs, ceil_div(rows, kLanes) * kLanes, left_.get(),
                   kLeftStride);
  }
  template <class Row>
  void add(Row&& b, int64_t columns, bool accumulate, const GradientPart<bf16>& part) {
    interleave_steps(b, columns, right_.get());
    tiles_.configure(kTileRows);
    for (int64_t i = 0; i < rows_; i += kBlockSide) {
      const bf16* left = reinterpret_cast<const bf16*>(left_.get() + i * kLeftStride);
      float* sums = sums_.get() + i * kSumStride;
      for (int64_t j = 0; j < columns; j += kBlockSide)
        tile_sums(left, 2 * kLeftStride, right_.get() + j, kSumStride, steps(), sums + j, kSumStride, accumulate);
      if (part.out != nullptr) store_rows(sums, least(kBlockSide, rows_ - i), columns, part.out + i * part.ld, part);
    }
  }

 private:
  static constexpr int64_t kLeftStride = kSumDepth / 2 + kLanes;  // 32-bit elements

  int64_t steps() const { return ceil_div(depth_, kTileDepth); }
  // Zeros behind the last row: what lies there may be NaN.
  template <class Row>
  void interleave_steps(Row&& row, int64_t columns, uint32_t* out) const {
    interleave<bf16>(row, depth_, columns, out);
    const int64_t pairs = ceil_div(depth_, 2);
    std::memset(out + pairs * kSumStride, 0, size_t((steps() * kPairs - pairs) * kSumStride) * sizeof(uint32_t));
  }
  // Long stretches of rows: single cache lines are written past the caches at 10 GB/s, two and more of a row at 16.
  static void store_rows(const float* sums, int64_t rows, int64_t columns, bf16* out, const GradientPart<bf16>& part) {
    for (int64_t r = 0; r < rows; ++r, sums += kSumStride, out += part.ld) {
      int64_t j = 0;
      for (; j + kPanel <= columns; j += kPanel) {
        const Vec low = load(sums + j), high = load(sums + j + kLanes);
        part.streamed ? store_streamed(out + j, low, high) : store_both(out + j, low, high);
      }
      if (j == columns) continue;
      bf16 row[kPanel];
      store_both(row, load(sums + j), load(sums + j + kLanes));
      std::memcpy(out + j, row, size_t(columns - j) * sizeof(bf16));
    }
  }

  TileScope tiles_;
  std::unique_ptr<uint32_t[]> pairs_ = scratch<uint32_t>(kSumStride * kSumDepth / 2),
                              right_ = scratch<uint32_t>(kSumStride * kSumDepth / 2), left_ = scratch<uint32_t>(kLeftStride * kSumRows);
  std::unique_ptr<float[]> sums_ = scratch<float>(kSumRows * kSumStride);
  int64_t depth_ = 0, rows_ = 0;
};
#endif

// out[e][i][j] = sum over the rows r of e of a(r)[i] * b(r)[j], a(r) a row of m elements and b(r) one of n; zero for experts
// without rows.
template <class T, class RowA, class RowB>
void weight_gradient(const int32_t* offsets, int64_t experts, int64_t m, int64_t n, T* out, const Parallel& parallel, RowA&& a, RowB&& b) {
  const int64_t tiles_m = ceil_div(m, kSumRows), tiles_n = ceil_div(n, kSumColumns);
  constexpr int64_t line = 64 / sizeof(T);
  const bool streamed =
      experts * m * n * int64_t(sizeof(T)) >= kStreamedBytes && n % line == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  const int64_t parts = parts_per_block(experts * tiles_m, tiles_n, parallel.num_threads());
  parallel.items(experts * tiles_m * parts, [&](ItemQueue& queue) {
    RowSums<T> sums;
    for (int64_t item; queue.next(item);) {
      const int64_t e = item / (tiles_m * parts), i0 = item / parts % tiles_m * kSumRows, part = item % parts;
      const int64_t rows = least(kSumRows, m - i0), begin = offsets[e], end = offsets[e + 1];
      for (int64_t tile = tiles_n * part / parts; tile < tiles_n * (part + 1) / parts; ++tile) {
        const int64_t j0 = tile * kSumColumns, columns = least(kSumColumns, n - j0);
        T* to = out + (e * m + i0) * n + j0;
        if (begin == end)
          for (int64_t i = 0; i < rows; ++i) std::memset(to + i * n, 0, size_t(columns) * sizeof(T));
        for (int64_t r = begin; r < end; r += kSumDepth) {
          const int64_t depth = least(kSumDepth, end - r);
          const bool last = r + depth == end;
          if (tile == tiles_n * part / parts || end - begin > kSumDepth)
            sums.set_left([&](int64_t i) { return a(r + i) + i0; }, depth, rows);
          sums.add([&](int64_t i) { return b(r + i) + j0; }, columns, r > begin, {last ? to : nullptr, n, last && streamed});
        }
      }
    }
    finish_streamed();
  });
}

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
