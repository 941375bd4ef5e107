// Products of bf16 on the tiles of AMX: gemm_packed (packed_gemm.h) at the levels that have them.
//
// A block is 32 x 32 of C in four tiles. One step of 32 k loads two tiles of A and two of B, 4 KB, for four products of 16 x 16 x 32:
// 16 FLOP a byte, twice as many as a product of single tiles would have. A is read as it lies; a panel of packed B is two tiles wide and
// its 16 rows of pairs are 128 bytes apart.
#pragma once

#include "common/amx_tile.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

constexpr int64_t kTileDepth = 32;               // k of one step
constexpr int64_t kBlockSide = 2 * kTileRows;    // rows and columns of a block
constexpr int64_t kPanelBytes = kBlockSide * 4;  // from one pair of k in a panel to the next
constexpr int64_t kPairs = kTileDepth / 2;

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

// One step: the upper and lower half of C += those of A (stride in bytes) times B.
template <bool kUpper, bool kLower>
inline void tile_step(const bf16* upper, const bf16* lower, int64_t stride, const uint32_t* b) {
  tile_load<6>(b, kPanelBytes);
  if constexpr (kUpper) {
    tile_load<4>(upper, stride);
    tile_multiply<0, 4, 6>();
  }
  tile_load<7>(b + kTileRows, kPanelBytes);
  if constexpr (kUpper) tile_multiply<1, 4, 7>();
  if constexpr (kLower) {
    tile_load<5>(lower, stride);
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
}

// `rows` rows of A times one panel. The upper half has 16 of them, the lower half the configured number.
template <bool kUpper, bool kLower>
__attribute__((noinline)) void tile_block(const bf16* a, int64_t lda, int64_t rows, const uint32_t* panel, const PanelTail& tail, int64_t k,
                                          float* c, int64_t ldc, bool accumulate, int64_t columns) {
  constexpr int64_t kHalf = kUpper ? kTileRows : 0;  // where the lower half begins
  const bool whole = columns >= kBlockSide;          // else C has no room for a block
  alignas(64) float block[kBlockSide * kBlockSide];
  float* to = whole ? c : block;
  const int64_t stride = (whole ? ldc : kBlockSide) * 4;
  float* to_lower = to + kHalf * stride / 4;
  if (whole && accumulate) {
    if constexpr (kUpper) tile_load<0>(to, stride), tile_load<1>(to + kTileRows, stride);
    if constexpr (kLower) tile_load<2>(to_lower, stride), tile_load<3>(to_lower + kTileRows, stride);
  } else {
    if constexpr (kUpper) tile_zero<0>(), tile_zero<1>();
    if constexpr (kLower) tile_zero<2>(), tile_zero<3>();
  }
  const int64_t main = k / kTileDepth * kTileDepth;
  for (int64_t i = 0; i < main; i += kTileDepth) tile_step<kUpper, kLower>(a + i, a + kHalf * lda + i, lda * 2, panel + i / 2 * kBlockSide);
  if (main < k) {
    alignas(64) bf16 left[kBlockSide * kTileDepth];
    for (int64_t r = 0; r < rows; ++r) copy_padded(left + r * kTileDepth, a + r * lda + main, k - main);
    tile_step<kUpper, kLower>(left, left + kHalf * kTileDepth, kTileBytes, tail.pairs);
  }
  if constexpr (kUpper) tile_store<0>(to, stride), tile_store<1>(to + kTileRows, stride);
  if constexpr (kLower) tile_store<2>(to_lower, stride), tile_store<3>(to_lower + kTileRows, stride);
  if (whole) return;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t n = columns - j;
      float* out = c + r * ldc + j;
      const Vec sum = load(block + r * kBlockSide + j);
      if (n >= kLanes)
        store(out, accumulate ? load(out) + sum : sum);
      else
        store_partial(out, accumulate ? load_partial(out, n) + sum : sum, n);
    }
}

// As gemm_packed. The rows that are no whole block come last: other sizes of the tiles cost a configuration, which is made once for all
// panels.
__attribute__((noinline)) inline void gemm_tiles(const bf16* a, int64_t lda, int64_t m, const uint32_t* packed, int64_t n, int64_t k,
                                                 float* c, int64_t ldc, bool accumulate, int64_t panel) {
  TileScope tiles;
  const int64_t main = m / kBlockSide * kBlockSide, rest = m - main;
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
        tile_block<true, true>(a + i * lda, lda, kBlockSide, b, tail, k, to + i * ldc, ldc, accumulate, columns);
    });
  if (rest == 0) return;
  a += main * lda, c += main * ldc;
  if (rest == kTileRows)
    panels(kTileRows, [&](const uint32_t* b, const PanelTail& tail, float* to, int64_t columns) {
      tile_block<true, false>(a, lda, rest, b, tail, k, to, ldc, accumulate, columns);
    });
  else if (rest > kTileRows)
    panels(rest - kTileRows, [&](const uint32_t* b, const PanelTail& tail, float* to, int64_t columns) {
      tile_block<true, true>(a, lda, rest, b, tail, k, to, ldc, accumulate, columns);
    });
  else
    panels(rest, [&](const uint32_t* b, const PanelTail& tail, float* to, int64_t columns) {
      tile_block<false, true>(a, lda, rest, b, tail, k, to, ldc, accumulate, columns);
    });
}

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
