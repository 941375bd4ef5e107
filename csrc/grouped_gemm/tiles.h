// Tile products of grouped_gemm and moe_mlp and their sizes. Included after the standard headers.
#pragma once

#include <memory>
#include <vector>

#include "common/huge_pages.h"
#include "common/parallel.h"
#include "grouped_gemm/row_blocks.h"

#include "common/gemm.h"
#include "common/packed_gemm.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

#if defined(LLADA_MATRIX_TILES)
constexpr int64_t kStepRows = 64;  // rows multiplied while they are in a near cache; a multiple of the kernels' rows
#else
constexpr int64_t kStepRows = 48;
#endif
constexpr int64_t kBlockRows = 384;  // rows of one work item, at most; a multiple of kStepRows
constexpr int64_t kTile = 64;        // columns of one work item

// Rows from which something is packed (measured): with fewer, rows of B are used as dot products, or columns with strides. On tiles the
// tokens are packed, not the weights, and the dot products of processors with tiles are slow: 100 GFLOP/s a core where 14 GB/s come from
// memory, so from about 5 rows on they and not memory would set the pace.
template <class T>
constexpr int64_t kPackRowsFrom = kOnTiles<T>    ? 5
                                  : kLanes == 16 ? 24
                                                 : 10;
constexpr int64_t kPackColumnsFrom = 8;
// From so many rows of A on, and below kPackRowsFrom, A is packed instead, where that was measured: at avx512_bf16, 512 tokens of the mini
// model, 16 an expert, took 60 instead of 72 ms in bf16.
template <class T>
constexpr int64_t kPackTokensFrom = kLanes == 16 && !kOnTiles<T> && (kPackedDepth<T> == 2 || sizeof(T) == 4) ? 9 : kPackRowsFrom<T>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
inline auto scratch(int64_t n) {
  auto memory = std::make_unique_for_overwrite<T[]>(size_t(n));
  advise_huge_pages(memory.get(), size_t(n) * sizeof(T));
  return memory;
}

// Into how many parts the tiles of each of `blocks` blocks are cut: one if that gives every thread enough items to choose from. An item
// reads its rows once for all its tiles, and long stretches of weights.
inline int64_t parts_per_block(int64_t blocks, int64_t tiles, int64_t threads) {
  return blocks == 0 ? 1 : least(tiles, ceil_div(8 * threads, blocks));
}

// Cuts the columns of every block into parts of whole tiles. worker(each) runs once per thread, where each(item) calls
// item(block, first column, end) for the parts that fall to it.
template <class Worker>
void in_parts(const std::vector<RowBlock>& blocks, int64_t columns, int64_t tile, const Parallel& parallel, Worker&& worker) {
  const int64_t tiles = ceil_div(columns, tile), parts = parts_per_block(int64_t(blocks.size()), tiles, parallel.num_threads());
  parallel.items(int64_t(blocks.size()) * parts, [&](ItemQueue& queue) {
    worker([&](auto&& item) {
      for (int64_t i; queue.next(i);) {
        const int64_t part = i % parts;
        item(blocks[size_t(i / parts)], tiles * part / parts * tile, least(columns, tiles * (part + 1) / parts * tile));
      }
    });
  });
}

// M rows of A times N rows of B as dot products. The N rows after those are fetched meanwhile: hardware prefetchers stop at the end of a
// page, which is one row of 2048 bf16.
template <int M, int N, class T>
inline void stream_tile(const T* a, int64_t lda, const T* b, int64_t k, float* c, int64_t ldc) {
  constexpr int64_t step = kDotStep<T, T>;
  Vec acc[M][N] = {};
  const T* ahead = b + N * k;
  for (int64_t i = 0; i + step <= k; i += step) {
    VecU bv[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      __builtin_prefetch(ahead + n * k + i);
      if constexpr (step == kLanes)
        bv[n] = (VecU)load(b + n * k + i);
      else
        bv[n] = load_packed(b + n * k + i);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      if constexpr (step == kLanes) {
        const Vec av = load(a + m * lda + i);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[m][n] += av * (Vec)bv[n];
      } else {
        const VecU av = load_packed(a + m * lda + i);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[m][n] = multiply_add_pairs(acc[m][n], av, bv[n]);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) c[m * ldc + n] = reduce_add(acc[m][n]);
}

// C[m][n] = A[m][k] * B[n][k] for few rows of A: every row of B comes from memory once, the others of A find it in the nearest cache.
template <class T>
__attribute__((noinline)) void gemm_stream(const T* a, int64_t lda, int64_t m, const T* b, int64_t n, int64_t k, float* c, int64_t ldc) {
  int64_t j = 0;
  if (k % kDotStep<T, T> == 0)
    for (; j + kDotColumns <= n; j += kDotColumns) {
      int64_t i = m % kDotRows;  // the odd ones first: they do the fetching
      if (i == 1) stream_tile<1, kDotColumns>(a, lda, b + j * k, k, c + j, ldc);
      if (i == 2) stream_tile<2, kDotColumns>(a, lda, b + j * k, k, c + j, ldc);
      if (i == 3) stream_tile<3, kDotColumns>(a, lda, b + j * k, k, c + j, ldc);
      for (; i + kDotRows <= m; i += kDotRows)
        i == 0 ? stream_tile<kDotRows, kDotColumns>(a, lda, b + j * k, k, c + j, ldc)
               : dot_tile<kDotRows, kDotColumns>(a + i * lda, lda, b + j * k, k, k, c + i * ldc + j, ldc, false);
    }
  if (j < n) gemm_nt(a, lda, b + j * k, k, m, n - j, k, c + j, ldc);
}

inline VecU load_wide(const float* p) { return (VecU)load(p); }
inline VecU load_wide(const bf16* p) { return (VecU)load(p); }
inline void store_narrow(float* p, VecU v) { store(p, (Vec)v); }
inline void store_narrow(bf16* p, VecU v) {
  const VecH h = __builtin_convertvector(v >> 16, VecH);
  std::memcpy(p, &h, sizeof h);
}

// out[c][r] = row(r)[c]
template <class T, class Row>
inline void transpose_rows(Row&& row, int64_t rows, int64_t columns, T* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      if (r + kLanes <= rows && c + kLanes <= columns) {
        VecU square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = load_wide(row(r + i) + c);
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store_narrow(out + (c + i) * ldo + r, square[i]);
      } else {
        for (int64_t i = r; i < least(r + kLanes, rows); ++i)
          for (int64_t j = c; j < least(c + kLanes, columns); ++j) out[j * ldo + i] = row(i)[j];
      }
    }
}

// B(k, n) = b[n * n_stride + k * k_stride] as right operand of products with `rows` rows: packed once if there are enough of them. On
// tiles, rows of B that lie in the order of k are the left operand of fewer rows than they are, which are packed instead; B must outlive
// the products then.
template <class T>
class RightOperand {
 public:
  void set(const T* b, int64_t n_stride, int64_t k_stride, int64_t n, int64_t k, int64_t rows) {
    b_ = b, n_stride_ = n_stride, k_stride_ = k_stride, n_ = n, k_ = k;
    packed_ = rows >= (k_stride == 1 ? kPackRowsFrom<T> : kPackColumnsFrom);
    swapped_ = kOnTiles<T> && packed_ && k_stride == 1 && rows < n;
    if (!packed_) return;
    if (const int64_t size = packed_size<T>(swapped_ ? kPanel : n, k); size > size_) buffer_ = scratch<uint32_t>(size_ = size);
    if (!swapped_) pack(buffer_.get(), b, n_stride, k_stride, n, k);
  }
  // C[m][n] = or += A[m][k] * B, A row-major. ahead: the operand that lies n columns further on is wanted next.
  void multiply(const T* a, int64_t lda, int64_t m, float* c, int64_t ldc, bool accumulate = false, bool ahead = false) const {
    if (swapped_)
      multiply_swapped(a, lda, m, c, ldc, accumulate);
    else if (packed_)
      gemm_packed(a, lda, m, buffer_.get(), n_, k_, c, ldc, accumulate, 0, ahead ? next() : Ahead{});
    else if (k_stride_ == 1)
      gemm_nt(a, lda, b_, n_stride_, m, n_, k_, c, ldc, accumulate);
    else
      gemm_nn(a, lda, 1, b_, k_stride_, m, n_, k_, c, ldc, accumulate);
  }

 private:
  // Its memory is read while this one is multiplied. Packing took 20 % of the time of 64 rows an expert, most of it waiting; now 13 %.
  Ahead next() const {
    const T* first = b_ + n_ * n_stride_;
    if (k_stride_ == 1) return rows_ahead(first, n_stride_, n_);
    constexpr int64_t size = sizeof(T), depth = 64 / size;  // elements of k in a cache line
    return {reinterpret_cast<const char*>(first), k_stride_ * size, depth * k_stride_ * size, depth, ceil_div(n_ * size, 64)};
  }
  void multiply_swapped(const T* a, int64_t lda, int64_t m, float* c, int64_t ldc, bool accumulate) const {
    float columns[kPanel * kPanel];  // of C: one for each of up to kPanel rows of B
    for (int64_t i = 0; i < m; i += kPanel) {
      const int64_t rows = least(kPanel, m - i);
      pack(buffer_.get(), a + i * lda, lda, 1, rows, k_);
      for (int64_t j = 0; j < n_; j += kPanel) {
        const int64_t count = least(kPanel, n_ - j);
        gemm_packed(b_ + j * n_stride_, n_stride_, count, buffer_.get(), rows, k_, columns, kPanel);
        float* to = c + i * ldc + j;
        if (!accumulate) {
          transpose_rows([&](int64_t r) { return columns + r * kPanel; }, count, rows, to, ldc);
          continue;
        }
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t l = 0; l < count; ++l) to[r * ldc + l] += columns[l * kPanel + r];
      }
    }
  }

  const T* b_ = nullptr;
  int64_t n_stride_ = 0, k_stride_ = 0, n_ = 0, k_ = 0, size_ = 0;
  bool packed_ = false, swapped_ = false;
  std::unique_ptr<uint32_t[]> buffer_;
};

// Rows of A, at least kPackTokensFrom and fewer than kPackRowsFrom: the first kLanes packed as the right operand of products with rows of B
// as they lie, further ones in dot products.
template <class T>
class PackedTokens {
 public:
  // A must outlive the products.
  void set(const T* a, int64_t rows, int64_t k) {
    a_ = a, k_ = k, rows_ = rows;
    if (const int64_t size = packed_size<T>(kLanes, k); size > size_) buffer_ = scratch<uint32_t>(size_ = size);
    pack(buffer_.get(), a, k, 1, least(rows, kLanes), k);
  }
  // C[m][n] = A[m][k] * B[n][k] for n <= kTile; C has room for at least kLanes rows.
  void multiply(const T* b, int64_t n, float* c, int64_t ldc) const {
    float tile[kTile * kLanes];
    gemm_few_columns(b, k_, n, buffer_.get(), kLanes, k_, tile, kLanes);
    transpose_rows([&](int64_t r) { return tile + r * kLanes; }, n, kLanes, c, ldc);
    if (rows_ > kLanes) gemm_nt(a_ + kLanes * k_, k_, b, k_, rows_ - kLanes, n, k_, c + kLanes * ldc, ldc);
  }

 private:
  const T* a_ = nullptr;
  int64_t rows_ = 0, k_ = 0, size_ = 0;
  std::unique_ptr<uint32_t[]> buffer_;
};

// rows x columns floats to T.
template <class T>
inline void store_tile(const float* tile, int64_t ld, int64_t rows, int64_t columns, T* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) store(out + r * ldo + i, load(tile + r * ld + i));
    for (; i < columns; ++i) out[r * ldo + i] = from_float<T>(tile[r * ld + i]);
  }
}

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
