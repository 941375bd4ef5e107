// Products of bf16 on the tiles of AMX: gemm_packed (packed_gemm.h) at the levels that have them.
//
// A block is 32 x 32 of C in four tiles. One step of 32 k loads two tiles of A and two of B, 4 KB, for four products of 16 x 16 x 32:
// 16 FLOP a byte, twice as many as a product of single tiles would have. A is read as it lies; a panel of packed B is two tiles wide and
// its 16 rows of pairs are 128 bytes apart. Up to 16 rows or columns take one tile of two.
#pragma once

#include "common/ahead.h"
#include "common/amx_tile.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

constexpr int64_t kTileDepth = 32;               // k of one step
constexpr int64_t kBlockSide = 2 * kTileRows;    // rows and columns of a block
constexpr int64_t kPanelBytes = kBlockSide * 4;  // from one pair of k in a panel to the next
constexpr int64_t kPairs = kTileDepth / 2;
static_assert(kTileDepth == kLineSteps<bf16> * kPackedDepth<bf16>);  // what is fetched ahead is counted in these

// The k that are left of a panel, filled up with zeros: what lies behind them in memory may be NaN, or not ours.
struct PanelTail {
  alignas(64) uint32_t pairs[kPairs * kBlockSide];

  PanelTail(const uint32_t* panel, int64_t k) {
    const int64_t left = k % kTileDepth, count = (left + 1) / 2;
    if (left == 0) return;
    std::memcpy(pairs, panel + (k - left) / 2 * kBlockSide, size_t(count * kPanelBytes));
    std::memset(pairs + count * kBlockSide, 0, size_t((kPairs - count) * kPanelBytes));
    if (left % 2)  // the last pair of a panel that was packed for more k has a second half
      for (int64_t i = (count - 1) * kBlockSide; i < count * kBlockSide; ++i) pairs[i] &= 0xffff;
  }
};

// What the panels of one call have in common. Rows of A: an upper half of 16 and a lower half of the configured number; one of the halves
// may be missing. Columns: a left half of 16, and a right one.
struct TileProduct {
  int64_t lda, k, ldc;
  bool accumulate;
};

// One step: the halves of C += those of A times B, strides in bytes. Loads come first: 5 % faster than each beside its first product.
template <bool kUpper, bool kLower, bool kRight>
inline void tile_step(const bf16* upper, const bf16* lower, int64_t stride, const uint32_t* b, int64_t b_stride = kPanelBytes) {
  tile_load<6>(b, b_stride);
  if constexpr (kUpper) tile_load<4>(upper, stride);
  if constexpr (kRight) tile_load<7>(b + kTileRows, b_stride);
  if constexpr (kLower) tile_load<5>(lower, stride);
  if constexpr (kUpper) tile_multiply<0, 4, 6>();
  if constexpr (kUpper && kRight) tile_multiply<1, 4, 7>();
  if constexpr (kLower) tile_multiply<2, 5, 6>();
  if constexpr (kLower && kRight) tile_multiply<3, 5, 7>();
}

// A block of C = or += 32 rows of A times 32 columns of pairs of B, whole steps of k; strides in elements. Tiles are configured.
__attribute__((noinline)) inline void tile_sums(const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t steps, float* c,
                                                int64_t ldc, bool accumulate) {
  float* lower = c + kTileRows * ldc;
  if (accumulate)
    tile_load<0>(c, ldc * 4), tile_load<1>(c + kTileRows, ldc * 4), tile_load<2>(lower, ldc * 4), tile_load<3>(lower + kTileRows, ldc * 4);
  else
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t i = 0; i < steps; ++i)
    tile_step<true, true, true>(a + i * kTileDepth, a + kTileRows * lda + i * kTileDepth, lda * 2, b + i * kPairs * ldb, ldb * 4);
  tile_store<0>(c, ldc * 4), tile_store<1>(c + kTileRows, ldc * 4);
  tile_store<2>(lower, ldc * 4), tile_store<3>(lower + kTileRows, ldc * 4);
}

// `rows` rows of A times one panel, of which there are `columns` columns.
template <bool kUpper, bool kLower, bool kRight>
__attribute__((noinline)) void tile_block(const TileProduct& p, const bf16* a, int64_t rows, const uint32_t* panel, const PanelTail& tail,
                                          float* c, int64_t columns, const Ahead& ahead) {
  constexpr int64_t kHalf = kUpper ? kTileRows : 0;  // where the lower half begins
  constexpr int64_t kWide = kRight ? kBlockSide : kTileRows;
  const bool whole = columns >= kWide;  // else C has no room for a block
  alignas(64) float block[kBlockSide * kBlockSide];
  float* to = whole ? c : block;
  const int64_t stride = (whole ? p.ldc : kBlockSide) * 4;
  float* to_lower = to + kHalf * stride / 4;
  if (whole && p.accumulate) {
    if constexpr (kUpper) tile_load<0>(to, stride);
    if constexpr (kUpper && kRight) tile_load<1>(to + kTileRows, stride);
    if constexpr (kLower) tile_load<2>(to_lower, stride);
    if constexpr (kLower && kRight) tile_load<3>(to_lower + kTileRows, stride);
  } else {
    if constexpr (kUpper) tile_zero<0>();
    if constexpr (kUpper && kRight) tile_zero<1>();
    if constexpr (kLower) tile_zero<2>();
    if constexpr (kLower && kRight) tile_zero<3>();
  }
  // In registers: what the instructions of tiles may write could be anything that is in memory.
  const int64_t main = p.k / kTileDepth * kTileDepth, a_stride = p.lda * 2, rows_ahead = ahead.rows, lines_ahead = ahead.lines,
                row_ahead = ahead.row, step_ahead = ahead.step;
  const bf16 *upper = a, *lower = a + kHalf * p.lda, *const end = a + main;
  const char* fetched = ahead.first;
  for (const uint32_t* b = panel; upper < end; upper += kTileDepth, lower += kTileDepth, b += kPairs * kBlockSide, fetched += step_ahead) {
    for (int64_t r = 0; r < rows_ahead; ++r)
      for (int64_t l = 0; l < lines_ahead; ++l) __builtin_prefetch(fetched + r * row_ahead + l * 64, 0, 2);
    tile_step<kUpper, kLower, kRight>(upper, lower, a_stride, b);
  }
  if (main < p.k) {
    alignas(64) bf16 left[kBlockSide * kTileDepth];
    for (int64_t r = 0; r < rows; ++r) copy_padded(left + r * kTileDepth, a + r * p.lda + main, p.k - main);
    tile_step<kUpper, kLower, kRight>(left, left + kHalf * kTileDepth, kTileBytes, tail.pairs);
  }
  if constexpr (kUpper) tile_store<0>(to, stride);
  if constexpr (kUpper && kRight) tile_store<1>(to + kTileRows, stride);
  if constexpr (kLower) tile_store<2>(to_lower, stride);
  if constexpr (kLower && kRight) tile_store<3>(to_lower + kTileRows, stride);
  if (whole) return;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t n = columns - j;
      float* out = c + r * p.ldc + j;
      const Vec sum = load(block + r * kBlockSide + j);
      if (n >= kLanes)
        store(out, p.accumulate ? load(out) + sum : sum);
      else
        store_partial(out, p.accumulate ? load_partial(out, n) + sum : sum, n);
    }
}

template <bool kUpper, bool kLower>
inline void tile_rows(const TileProduct& p, const bf16* a, int64_t rows, const uint32_t* panel, const PanelTail& tail, float* c,
                      int64_t columns, const Ahead& ahead) {
  columns > kTileRows ? tile_block<kUpper, kLower, true>(p, a, rows, panel, tail, c, columns, ahead)
                      : tile_block<kUpper, kLower, false>(p, a, rows, panel, tail, c, columns, ahead);
}

// As gemm_packed. The rows that are no whole block come last: other sizes of the tiles cost a configuration, which is made once for all
// panels.
__attribute__((noinline)) inline void gemm_tiles(const bf16* a, int64_t lda, int64_t m, const uint32_t* packed, int64_t n, int64_t k,
                                                 float* c, int64_t ldc, bool accumulate, int64_t panel, const Ahead& ahead) {
  TileScope tiles;
  const TileProduct product{lda, k, ldc, accumulate};
  const int64_t main = m / kBlockSide * kBlockSide, rest = m - main;
  const int64_t blocks = (m + kBlockSide - 1) / kBlockSide * ((n + kBlockSide - 1) / kBlockSide);  // each fetches its part
  int64_t block = 0;
  const auto panels = [&](int64_t lower_rows, auto&& rows) {
    tiles.configure(lower_rows);
    for (int64_t j = 0; j < n; j += kBlockSide) {
      const uint32_t* b = packed + j / kBlockSide * panel;
      rows(b, PanelTail(b, k), c + j, n - j);
    }
  };
  if (main > 0)
    panels(kTileRows, [&](const uint32_t* b, const PanelTail& tail, float* to, int64_t columns) {
      for (int64_t i = 0; i < main; i += kBlockSide)
        tile_rows<true, true>(product, a + i * lda, kBlockSide, b, tail, to + i * ldc, columns, ahead.part(block++, blocks));
    });
  if (rest == 0) return;
  a += main * lda, c += main * ldc;
  if (rest == kTileRows)
    panels(kTileRows, [&](const uint32_t* b, const PanelTail& tail, float* to, int64_t columns) {
      tile_rows<true, false>(product, a, rest, b, tail, to, columns, ahead.part(block++, blocks));
    });
  else if (rest > kTileRows)
    panels(rest - kTileRows, [&](const uint32_t* b, const PanelTail& tail, float* to, int64_t columns) {
      tile_rows<true, true>(product, a, rest, b, tail, to, columns, ahead.part(block++, blocks));
    });
  else
    panels(rest, [&](const uint32_t* b, const PanelTail& tail, float* to, int64_t columns) {
      tile_rows<false, true>(product, a, rest, b, tail, to, columns, ahead.part(block++, blocks));
    });
}

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
