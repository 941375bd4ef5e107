// Single-thread matrix product with a packed right operand: C[m][n] (+)= sum_k A[m][k] * B(k, n), fp32 accumulation.
//
// Packing costs one pass over B and pays from about 8 rows of A; below that gemm.h uses B as it lies.
// Layout: panels of kPanel columns, [ceil(n / kPanel)][k or k / 2][kPanel], zeros beyond n (and beyond an odd k). Elements are floats, or
// where the level multiplies pairs of bf16 (from avx512_bf16 on) 32-bit pairs of bf16, consecutive in k: the "VNNI" layout, which tiles are
// loaded from as well.
#pragma once

#include <type_traits>

#include "common/ahead.h"
#if defined(LLADA_MATRIX_TILES)
#include "common/tile_gemm.h"
#endif

namespace llada::LLADA_CPU_LEVEL {
namespace {

constexpr int kPanel = 2 * kLanes;
#if defined(LLADA_MATRIX_TILES)
static_assert(kPanel == kBlockSide);
#else
struct TileScope {  // nothing to keep
  TileScope() {}
};
#endif
#if defined(LLADA_CPU_LEVEL_avx512)
constexpr int kPackedRows = 12;  // x 2 vectors: 24 accumulators + 2 + 1 of 32 registers
#else
constexpr int kPackedRows = 6;  // 12 + 2 + 1 of 16 registers
#endif

// Size of a packed operand in 32-bit elements.
template <class T>
constexpr int64_t packed_size(int64_t n, int64_t k) {
  return (n + kPanel - 1) / kPanel * kPanel * ((k + kPackedDepth<T> - 1) / kPackedDepth<T>);
}

template <class T>
inline uint32_t packed_element(const T* b, int64_t k_stride, int64_t k, int64_t k_end) {
  if constexpr (kPackedDepth<T> == 2) {
    const uint32_t low = b[k * 2 * k_stride].bits;
    const uint32_t high = k * 2 + 1 < k_end ? b[(k * 2 + 1) * k_stride].bits : 0;
    return low | high << 16;
  } else {
    const float x = to_float(b[k * k_stride]);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
  }
}

// rows[i][j] becomes rows[j][i]: swaps the off-diagonal halves of ever larger squares.
inline void transpose(VecU (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int bit = 1; bit < kLanes; bit *= 2) {
    VecI low, high;  // lane l of the upper row: its own where l lacks the bit, else the lower row's lane l without the bit
    for (int l = 0; l < kLanes; ++l) {
      low[l] = l & bit ? kLanes + (l ^ bit) : l;
      high[l] = l & bit ? kLanes + l : l | bit;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & bit) continue;
      const VecU a = rows[i], b = rows[i | bit];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i | bit] = __builtin_shuffle(a, b, high);
    }
  }
}

// kLanes columns and steps of a panel; behind the first `columns` zeros, where not all are there.
template <bool kAll, class T>
inline void transpose_steps(const T* column, int64_t n_stride, int64_t columns, uint32_t* to) {
  VecU rows[kLanes];
#pragma GCC unroll 16
  for (int c = 0; c < kLanes; ++c, column += n_stride) {
    rows[c] = kAll || c < columns ? load_packed(column) : VecU{};
    __asm__("" : "+r"(column));  // else the compiler keeps 16 addresses, more than there are registers: half as fast
  }
  transpose(rows);
#pragma GCC unroll 16
  for (int c = 0; c < kLanes; ++c) std::memcpy(to + c * kPanel, &rows[c], sizeof(VecU));
}

// to[c] = the pair of low[c] and high[c], for kPanel columns.
inline void pair_rows(const bf16* low, const bf16* high, uint32_t* to) {
  using Row = uint16_t __attribute__((vector_size(2 * kPanel)));
  Row a, b, first, second;
  for (int i = 0; i < kLanes; ++i) {
    first[2 * i] = uint16_t(i), first[2 * i + 1] = uint16_t(kPanel + i);
    second[2 * i] = uint16_t(kLanes + i), second[2 * i + 1] = uint16_t(kPanel + kLanes + i);
  }
  std::memcpy(&a, low, sizeof a), std::memcpy(&b, high, sizeof b);
  first = __builtin_shuffle(a, b, first), second = __builtin_shuffle(a, b, second);
  std::memcpy(to, &first, sizeof first), std::memcpy(to + kLanes, &second, sizeof second);
}

// B(k, n) = b[n * n_stride + k * k_stride]; fast where one of the strides is 1. panel: 32-bit elements from one panel to the next, where
// there is more k than is packed here; 0: no more.
template <class T>
__attribute__((noinline)) void pack(uint32_t* packed, const T* b, int64_t n_stride, int64_t k_stride, int64_t n, int64_t k,
                                    int64_t panel = 0) {
  constexpr int64_t kDepth = kPackedDepth<T>;
  const int64_t depth = (k + kDepth - 1) / kDepth, whole = k / kDepth;
  if (panel == 0) panel = depth * kPanel;
  for (int64_t j = 0; j < n; j += kPanel, packed += panel) {
    const int64_t columns = n - j < kPanel ? n - j : kPanel;
    int64_t done = 0;
    if (k_stride == 1) {
      for (int half = 0; half < kPanel; half += kLanes) {
        done = 0;
        if (half + kLanes <= columns)
          for (; done + kLanes <= whole; done += kLanes)
            transpose_steps<true>(b + (j + half) * n_stride + done * kDepth, n_stride, kLanes, packed + done * kPanel + half);
        else
          for (; done + kLanes <= whole; done += kLanes)
            transpose_steps<false>(b + (j + half) * n_stride + done * kDepth, n_stride, columns - half, packed + done * kPanel + half);
      }
    } else if (columns == kPanel && n_stride == 1) {
      for (; done < whole; ++done) {
        const T* row = b + j + done * kDepth * k_stride;
        uint32_t* to = packed + done * kPanel;
        if constexpr (kDepth == 2) {
          pair_rows(row, row + k_stride, to);
        } else {
          const Vec low = load(row), high = load(row + kLanes);
          std::memcpy(to, &low, sizeof low), std::memcpy(to + kLanes, &high, sizeof high);
        }
      }
    }
    for (int64_t i = done; i < depth; ++i) {
      for (int64_t c = 0; c < columns; ++c) packed[i * kPanel + c] = packed_element(b + (j + c) * n_stride, k_stride, i, k);
      for (int64_t c = columns; c < kPanel; ++c) packed[i * kPanel + c] = 0;
    }
  }
}

inline Vec multiply_add(Vec acc, const float* a, Vec b, std::integral_constant<int, 1>) {
  float x;
  std::memcpy(&x, a, 4);  // may be an element of a packed operand
  return acc + x * b;
}
inline Vec multiply_add(Vec acc, const bf16* a, Vec b, std::integral_constant<int, 1>) { return acc + to_float(*a) * b; }
inline Vec multiply_add(Vec acc, const bf16* a, Vec b, std::integral_constant<int, 2>) {
  uint32_t pair;
  std::memcpy(&pair, a, 4);
  return multiply_add_pairs(acc, VecU{} + pair, (VecU)b);
}

template <int M, class T>
inline void packed_tile(const T* a, int64_t lda, const float* b, int64_t k, float* c, int64_t ldc, bool accumulate, int64_t columns,
                        const Ahead& ahead) {
  Vec acc[M][2] = {};
  constexpr int depth = kPackedDepth<T>;
  const int64_t steps = k / depth;
  const char* fetched = ahead.first;
  const int64_t group = ahead.rows > 0 ? kLineSteps<T> : steps;
  for (int64_t from = 0; from < steps; from += group, fetched += ahead.step) {
    for (int64_t r = 0; r < ahead.rows; ++r)
      for (int64_t l = 0; l < ahead.lines; ++l) __builtin_prefetch(fetched + r * ahead.row + l * 64, 0, 2);
    const int64_t to = from + group < steps ? from + group : steps;
    for (int64_t i = from; i < to; ++i) {
      const Vec b0 = load(b + i * kPanel), b1 = load(b + i * kPanel + kLanes);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        acc[m][0] = multiply_add(acc[m][0], a + m * lda + i * depth, b0, std::integral_constant<int, depth>());
        acc[m][1] = multiply_add(acc[m][1], a + m * lda + i * depth, b1, std::integral_constant<int, depth>());
      }
    }
  }
  if constexpr (depth == 2) {
    if (k % 2) {  // the last element alone: its partner in A may not exist, in a panel packed for more k it is hidden
      const Vec b0 = (Vec)((VecU)load(b + steps * kPanel) & 0xffff), b1 = (Vec)((VecU)load(b + steps * kPanel + kLanes) & 0xffff);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const T last[2] = {a[m * lda + k - 1], T{0}};
        acc[m][0] = multiply_add(acc[m][0], last, b0, std::integral_constant<int, depth>());
        acc[m][1] = multiply_add(acc[m][1], last, b1, std::integral_constant<int, depth>());
      }
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* out = c + m * ldc + v * kLanes;
      const int64_t left = columns - v * kLanes;
      if (left >= kLanes)
        store(out, accumulate ? load(out) + acc[m][v] : acc[m][v]);
      else if (left > 0)
        store_partial(out, accumulate ? load_partial(out, left) + acc[m][v] : acc[m][v], left);
    }
}

template <int M, class T>
inline void packed_rows(int64_t m, const T* a, int64_t lda, const float* b, int64_t k, float* c, int64_t ldc, bool accumulate,
                        int64_t columns, const Ahead& ahead) {
  if (m == M) return packed_tile<M>(a, lda, b, k, c, ldc, accumulate, columns, ahead);
  if constexpr (M > 1) packed_rows<M - 1>(m, a, lda, b, k, c, ldc, accumulate, columns, ahead);
}

// panel: 32-bit elements from one panel of `packed` to the next, where it was packed for more k than are multiplied here; 0: as many.
template <class T>
__attribute__((noinline)) void gemm_packed(const T* a, int64_t lda, int64_t m, const uint32_t* packed, int64_t n, int64_t k, float* c,
                                           int64_t ldc, bool accumulate = false, int64_t panel = 0, const Ahead& ahead = {}) {
  if (panel == 0) panel = packed_size<T>(kPanel, k);
  if constexpr (kOnTiles<T>) return gemm_tiles(a, lda, m, packed, n, k, c, ldc, accumulate, panel, ahead);
  const int64_t panels = (n + kPanel - 1) / kPanel;
  for (int64_t j = 0; j < n; j += kPanel, packed += panel) {
    const float* b = reinterpret_cast<const float*>(packed);
    const int64_t columns = n - j < kPanel ? n - j : kPanel;
    const int64_t tiles = (m + kPackedRows - 1) / kPackedRows;  // of rows, alike in size: each reads all of the panel
    for (int64_t t = 0, i = 0, end; t < tiles; ++t, i = end) {
      end = m * (t + 1) / tiles;
      packed_rows<kPackedRows>(end - i, a + i * lda, lda, b, k, c + i * ldc + j, ldc, accumulate, columns,
                               ahead.part(j / kPanel * tiles + t, panels * tiles));
    }
  }
}

// Rows of 4 KB share one set of 12 lines of the nearest cache: 8 rows and the panel fit, 16 (or the next 8 as well) took 1.6 times as long.
constexpr int kNarrowRows = kLanes == 16 ? 8 : 4;

// Of at most kLanes columns, the first half of a panel: products with the other half would be of zeros. The next rows of A are fetched
// meanwhile: hardware prefetchers stop at the end of a page, which is one row of 2048 bf16. Even and odd steps are summed apart, as 8 sums
// wait for each other: 16 positions of an LM head 29 -> 21 ms.
template <int M, class T>
inline void narrow_tile(const T* a, int64_t lda, int64_t k, const float* b, float* c, int64_t ldc) {
  constexpr int depth = kPackedDepth<T>;
  constexpr std::integral_constant<int, depth> tag;
  const int64_t steps = k / depth;
  Vec acc[M][2] = {};
  const auto add = [&](int64_t i, int odd) {
    const Vec bv = load(b + i * kPanel);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[m][odd] = multiply_add(acc[m][odd], a + m * lda + i * depth, bv, tag);
  };
  for (int64_t from = 0, i = 0; from < steps; from += kLineSteps<T>) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) __builtin_prefetch(a + (M + m) * lda + from * depth, 0, 2);
    const int64_t to = from + kLineSteps<T> < steps ? from + kLineSteps<T> : steps;
    for (; i + 2 <= to; i += 2) add(i, 0), add(i + 1, 1);
    if (i < to) add(i++, 0);
  }
  if (steps * depth < k) {  // the last element alone: its partner in the panel is zero
    const Vec bv = load(b + steps * kPanel);
    for (int m = 0; m < M; ++m) {
      const T last[2] = {a[m * lda + k - 1], T{0}};
      acc[m][0] = multiply_add(acc[m][0], last, bv, tag);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) store(c + m * ldc, acc[m][0] + acc[m][1]);
}

// gemm_packed for few columns, n of them, a multiple of kLanes; B is packed for this k. Without tiles `ahead` counts where there are whole
// panels: the half one fetches the next rows of A.
template <class T>
__attribute__((noinline)) void gemm_few_columns(const T* a, int64_t lda, int64_t m, const uint32_t* packed, int64_t n, int64_t k, float* c,
                                                int64_t ldc, const Ahead& ahead = {}) {
  if constexpr (kOnTiles<T>) return gemm_packed(a, lda, m, packed, n, k, c, ldc, false, 0, ahead);
  const int64_t wide = n / kPanel * kPanel;
  if (wide > 0) gemm_packed(a, lda, m, packed, wide, k, c, ldc, false, 0, ahead);
  if (wide == n) return;
  const float* b = reinterpret_cast<const float*>(packed + packed_size<T>(wide, k));
  int64_t i = 0;
  for (; i + kNarrowRows <= m; i += kNarrowRows) narrow_tile<kNarrowRows>(a + i * lda, lda, k, b, c + i * ldc + wide, ldc);
  for (; i < m; ++i) narrow_tile<1>(a + i * lda, lda, k, b, c + i * ldc + wide, ldc);
}

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
