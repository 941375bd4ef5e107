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
constexpr int64_t kStepRows = 64;    // rows multiplied while they are in a near cache; a multiple of the kernels' rows
constexpr int64_t kBlockRows = 128;  // rows of one work item, at most; a multiple of kStepRows
#else
constexpr int64_t kStepRows = 48;
constexpr int64_t kBlockRows = 384;
#endif
constexpr int64_t kTile = 64;  // columns of one work item

// Rows from which weights are packed, columns from which they are (measured): with fewer, rows of B are used as dot products, or columns
// with strides. On tiles weights in the order of k are never packed: they are the left operand.
template <class T>
constexpr int64_t kPackRowsFrom = kOnTiles<T>    ? std::numeric_limits<int64_t>::max()
                                  : kLanes == 16 ? 24
                                                 : 10;
constexpr int64_t kPackColumnsFrom = 8;
// From so many rows of A on, and below kPackRowsFrom, A is packed instead, where that was measured: at avx512_bf16, 512 tokens of the mini
// model, 16 an expert, took 60 instead of 72 ms in bf16. Dot products of processors with tiles are slow: 70 GFLOP/s a core where 10 GB/s
// come from memory, so from about 5 rows on they and not memory would set the pace.
template <class T>
constexpr int64_t kPackTokensFrom = kOnTiles<T>                                                ? 5
                                    : kLanes == 16 && (kPackedDepth<T> == 2 || sizeof(T) == 4) ? 9
                                                                                               : kPackRowsFrom<T>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
inline auto scratch(int64_t n) {
  auto memory = std::make_unique_for_overwrite<T[]>(size_t(n));
  advise_huge_pages(memory.get(), size_t(n) * sizeof(T));
  return memory;
}

// Memory that grows and is used again.
template <class T>
class Buffer {
 public:
  T* reserve(int64_t n) {
    if (n > size_) memory_ = scratch<T>(size_ = n);
    return memory_.get();
  }
  T* get() const { return memory_.get(); }

 private:
  std::unique_ptr<T[]> memory_;
  int64_t size_ = 0;
};

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

// M rows of A times N rows of B as dot products. The rows kRowsAhead * N further on are fetched meanwhile: hardware prefetchers stop at the
// end of a page, which is one row of 2048 bf16.
template <int M, int N, class T>
inline void stream_tile(const T* a, int64_t lda, const T* b, int64_t k, float* c, int64_t ldc) {
  constexpr int64_t step = kDotStep<T, T>;
  Vec acc[M][N] = {};
  const T* ahead = b + kRowsAhead * N * k;
  for (int64_t i = 0; i + step <= k; i += step) {
    VecU bv[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      fetch(ahead + n * k + i);
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
inline VecU load_wide(const uint32_t* p) {
  VecU v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store_narrow(uint32_t* p, VecU v) { std::memcpy(p, &v, sizeof v); }
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

// Rows of tokens that are multiplied with rows of weights, A * B^T, both in the order of k: few are used as they lie, more (from
// kPackTokensFrom) are packed as the right operand of products with weights as they lie, and still more (from kPackRowsFrom) multiply
// packed weights. What is set must outlive the products.
template <class T>
class Tokens {
 public:
  void set(const T* a, int64_t lda, int64_t rows, int64_t k) {
    a_ = a, lda_ = lda, rows_ = rows, k_ = k;
    if (packed()) pack(buffer_.reserve(packed_size<T>(packed_rows(), k)), a, lda, 1, packed_rows(), k);
  }
  bool multiply_packed_weights() const { return rows_ >= kPackRowsFrom<T>; }
  bool packed() const { return !multiply_packed_weights() && rows_ >= kPackTokensFrom<T>; }
  // Without tiles more than one vector of tokens is a product of the first and dot products.
  int64_t packed_rows() const { return kOnTiles<T> ? rows_ : least(rows_, kLanes); }
  static constexpr int64_t kPackedStep = kOnTiles<T> ? kStepRows : kLanes;

  const T* row(int64_t r) const { return a_ + r * lda_; }
  const uint32_t* packed(int64_t r) const { return buffer_.get() + packed_size<T>(r, k_); }
  int64_t lda() const { return lda_; }
  int64_t rows() const { return rows_; }
  int64_t k() const { return k_; }

 private:
  const T* a_ = nullptr;
  int64_t lda_ = 0, rows_ = 0, k_ = 0;
  Buffer<uint32_t> buffer_;
};

template <class T>
class Weights {
 public:
  void set(const T* b, int64_t ldb, int64_t n, const Tokens<T>& tokens) {
    b_ = b, ldb_ = ldb, n_ = n;
    if (tokens.multiply_packed_weights()) pack(buffer_.reserve(packed_size<T>(n, tokens.k())), b, ldb, 1, n, tokens.k());
  }
  // C[m][n] for m tokens from `first`, a multiple of kStepRows, on; C has room for a multiple of kLanes rows. ahead: the n weights after
  // these are wanted next. Their memory is read meanwhile: packing took 20 % of the time of 64 rows an expert, most of it waiting; now 13
  // %.
  void multiply(const Tokens<T>& tokens, int64_t first, int64_t m, float* c, int64_t ldc, bool ahead = false) const {
    const int64_t k = tokens.k();
    Ahead next = ahead ? rows_ahead(b_ + n_ * ldb_, ldb_, n_) : Ahead{};
    if (tokens.multiply_packed_weights()) {
      if (first > 0) next.rows = 0;
      return gemm_packed(tokens.row(first), tokens.lda(), m, buffer_.get(), n_, k, c, ldc, false, 0, next);
    }
    if (!tokens.packed()) return gemm_nt(tokens.row(first), tokens.lda(), b_, ldb_, m, n_, k, c, ldc);
    const int64_t packed = least(m, tokens.packed_rows() - first), columns = ceil_div(packed, kLanes) * kLanes;
    next = next.part(first / kStepRows, ceil_div(tokens.rows(), kStepRows));
    float tile[kTile * Tokens<T>::kPackedStep];
    for (int64_t j = 0; j < n_; j += kTile) {
      const int64_t n = least(kTile, n_ - j);
      gemm_few_columns(b_ + j * ldb_, ldb_, n, tokens.packed(first), columns, k, tile, columns, next.part(j / kTile, ceil_div(n_, kTile)));
      transpose_rows([&](int64_t r) { return tile + r * columns; }, n, columns, c + j, ldc);
    }
    if (packed < m) gemm_nt(tokens.row(first + packed), tokens.lda(), b_, ldb_, m - packed, n_, k, c + packed * ldc, ldc);
  }

 private:
  const T* b_ = nullptr;
  int64_t ldb_ = 0, n_ = 0;
  Buffer<uint32_t> buffer_;
};

// Columns [n] of rows of T, `depth` of which follow each other.
template <class T>
inline Ahead columns_ahead(const T* first, int64_t ld, int64_t n) {
  constexpr int64_t size = sizeof(T), depth = 64 / size;  // elements of k in a cache line
  return {reinterpret_cast<const char*>(first), ld * size, depth * ld * size, depth, ceil_div(n * size, 64)};
}

// B(k, n) = b[k * ldb + n] as right operand of products with `rows` rows: packed once if there are enough of them.
template <class T>
class RightOperand {
 public:
  void set(const T* b, int64_t ldb, int64_t n, int64_t k, int64_t rows) {
    b_ = b, ldb_ = ldb, n_ = n, k_ = k;
    packed_ = rows >= kPackColumnsFrom;
    if (packed_) pack(buffer_.reserve(packed_size<T>(n, k)), b, 1, ldb, n, k);
  }
  // C[m][n] = or += A[m][k] * B, A row-major.
  void multiply(const T* a, int64_t lda, int64_t m, float* c, int64_t ldc, bool accumulate = false, const Ahead& ahead = {}) const {
    if (packed_)
      gemm_packed(a, lda, m, buffer_.get(), n_, k_, c, ldc, accumulate, 0, ahead);
    else
      gemm_nn(a, lda, 1, b_, ldb_, m, n_, k_, c, ldc, accumulate);
  }

 private:
  const T* b_ = nullptr;
  int64_t ldb_ = 0, n_ = 0, k_ = 0;
  bool packed_ = false;
  Buffer<uint32_t> buffer_;
};

// How much of B is packed at once. On tiles long stretches of rows: strips of 128 bytes came with half of the bandwidth (5 of 10 GB/s), and
// tiles are loaded slowly meanwhile. The sums wait in a cache for the next rows.
template <class T>
constexpr int64_t kStripColumns = kOnTiles<T> ? 512 : kTile;
template <class T>
constexpr int64_t kStripDepth = kOnTiles<T> ? 256 : std::numeric_limits<int64_t>::max();

// C[rows][columns] = A[rows][k] * B(k, n) = b[k * ldb + n] for up to kBlockRows rows, in parts: done(row, rows, column, columns, part of C,
// its leading dimension).
template <class T>
class ColumnProduct {
 public:
  template <class Done>
  void multiply(const T* a, int64_t lda, int64_t rows, const T* b, int64_t ldb, int64_t columns, int64_t k, Done&& done) {
    constexpr int64_t ld = kStripColumns<T>;
    const bool whole = k <= kStripDepth<T>;
    sums_.reserve((whole ? kStepRows : kBlockRows) * ld);
    for (int64_t j = 0; j < columns; j += ld) {
      const int64_t n = least(ld, columns - j);
      int64_t k0 = 0, depth;
      do {  // once for k = 0 too: sums of nothing
        depth = least(kStripDepth<T>, k - k0);
        operand_.set(b + k0 * ldb + j, ldb, n, depth, rows);
        Ahead ahead;  // the rows of B below, or its next columns
        if (k0 + depth < k)
          ahead = columns_ahead(b + (k0 + depth) * ldb + j, ldb, n);
        else if (j + n < columns)
          ahead = columns_ahead(b + j + n, ldb, least(ld, columns - j - n));
        for (int64_t r = 0; r < rows; r += kStepRows) {
          const int64_t m = least(kStepRows, rows - r);
          float* c = sums_.get() + (whole ? 0 : r * ld);
          operand_.multiply(a + r * lda + k0, lda, m, c, ld, k0 > 0,
                            kOnTiles<T> ? ahead.part(r / kStepRows, ceil_div(rows, kStepRows)) : ahead);
          if (!kOnTiles<T>) ahead.rows = 0;  // all of it has been fetched
          if (k0 + depth == k) done(r, m, j, n, c, ld);
        }
        k0 += depth;
      } while (k0 < k);
    }
  }

 private:
  RightOperand<T> operand_;
  Buffer<float> sums_;
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
