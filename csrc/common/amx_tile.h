// The tile registers of AMX: eight matrices of up to 16 rows of 64 bytes. At level amx_emulated a scalar stand-in keeps the semantics of
// Intel's manual (operand layouts, configured sizes, what is undefined is an error), so that what is written for tiles is tested anywhere.
//
// The compiler knows nothing of these registers. The instructions are volatile, so they stay in order, and those that touch memory say so.
#pragma once

#include "common/simd.h"

#if defined(LLADA_CPU_LEVEL_amx_emulated)
#include <stdexcept>
#endif

namespace llada::LLADA_CPU_LEVEL {
namespace {

constexpr int kTileRows = 16, kTileBytes = 64, kTileCount = 8;

// What ldtilecfg reads: per tile its rows and the bytes of a row.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

#if defined(LLADA_CPU_LEVEL_amx)

// Sets the sizes of all tiles and their contents to 0.
inline void tile_configure(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes)); }
inline void tile_release() { __asm__ volatile("tilerelease"); }

template <int kTile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// Row r of the tile is at p + r * stride bytes.
template <int kTile>
inline void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}
// C[m][n] += A[m][2k] * B[k][2n] + A[m][2k + 1] * B[k][2n + 1], summed over k: fp32 sums of bf16 products, subnormal numbers are 0.
template <int kC, int kA, int kB>
inline void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}
// 32 elements of which the first n < 32 are those of `from`, the others 0.
inline void copy_padded(bf16* to, const bf16* from, int64_t n) {
  _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16((uint32_t(1) << n) - 1, from));
}

#else

struct Tiles {
  TileShapes shapes;
  bool configured = false;
  uint8_t data[kTileCount][kTileRows][kTileBytes];

  // Rows of tile t, which must have been given a size.
  int rows(int t) const {
    if (!configured || shapes.rows[t] == 0 || shapes.row_bytes[t] == 0) throw std::logic_error("a tile without a size is used");
    return shapes.rows[t];
  }
  int bytes(int t) const { return shapes.row_bytes[t]; }
  // Beyond its configured rows and bytes a tile that was written is 0.
  void clear(int t) { std::memset(data[t], 0, sizeof data[t]); }
};

inline Tiles& tiles() {
  thread_local Tiles tiles;
  return tiles;
}

inline void tile_configure(const TileShapes& shapes) {
  for (int t = 0; t < kTileCount; ++t)
    if (shapes.palette != 1 || shapes.start_row != 0 || shapes.rows[t] > kTileRows || shapes.row_bytes[t] > kTileBytes)
      throw std::logic_error("tiles that no machine has");
  tiles().shapes = shapes;
  tiles().configured = true;
  for (int t = 0; t < kTileCount; ++t) tiles().clear(t);
}
inline void tile_release() { tiles().configured = false; }

template <int kTile>
inline void tile_zero() {
  tiles().rows(kTile);
  tiles().clear(kTile);
}
template <int kTile>
inline void tile_load(const void* p, int64_t stride) {
  Tiles& t = tiles();
  const int rows = t.rows(kTile);
  t.clear(kTile);
  for (int r = 0; r < rows; ++r) std::memcpy(t.data[kTile][r], static_cast<const char*>(p) + r * stride, size_t(t.bytes(kTile)));
}
template <int kTile>
inline void tile_store(void* p, int64_t stride) {
  const Tiles& t = tiles();
  const int rows = t.rows(kTile);
  for (int r = 0; r < rows; ++r) std::memcpy(static_cast<char*>(p) + r * stride, t.data[kTile][r], size_t(t.bytes(kTile)));
}
template <int kC, int kA, int kB>
inline void tile_multiply() {
  Tiles& t = tiles();
  const int rows = t.rows(kC), columns = t.bytes(kC) / 4, pairs = t.bytes(kA) / 4;
  if (t.rows(kA) != rows || t.rows(kB) != pairs || t.bytes(kB) != t.bytes(kC)) throw std::logic_error("tiles of sizes that do not match");
  for (int m = 0; m < rows; ++m) {
    float even[kTileBytes / 4] = {}, odd[kTileBytes / 4] = {}, c[kTileBytes / 4] = {};
    bf16 a[kTileBytes / 2], b[kTileBytes / 2];
    std::memcpy(a, t.data[kA][m], sizeof a);
    for (int k = 0; k < pairs; ++k) {
      std::memcpy(b, t.data[kB][k], sizeof b);
      for (int n = 0; n < columns; ++n) {
        even[n] += to_float(a[2 * k]) * to_float(b[2 * n]);
        odd[n] += to_float(a[2 * k + 1]) * to_float(b[2 * n + 1]);
      }
    }
    std::memcpy(c, t.data[kC][m], size_t(t.bytes(kC)));
    for (int n = 0; n < columns; ++n) c[n] += even[n] + odd[n];
    std::memcpy(t.data[kC][m], c, sizeof c);
  }
}
inline void copy_padded(bf16* to, const bf16* from, int64_t n) {
  for (int64_t i = 0; i < 32; ++i) to[i] = i < n ? from[i] : bf16{0};
}

#endif

// While one lives, the thread's tiles keep the sizes that the last product gave them; the last to go releases them, so that no switch of
// threads saves their 8 KB. Products open one; workers that make many small products do as well.
class TileScope {
 public:
  TileScope() { ++state().users; }
  ~TileScope() {
    if (--state().users > 0) return;
    tile_release();
    state().lower_rows = 0;
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

  // The sizes for tile_gemm.h: tiles 0-3 are C, 4 and 5 A, 6 and 7 B; all of 16 rows but the lower half of C (2, 3) and of A (5).
  void configure(int64_t lower_rows) {
    if (state().lower_rows == lower_rows) return;
    TileShapes shapes;
    for (int t = 0; t < kTileCount; ++t) {
      shapes.row_bytes[t] = kTileBytes;
      shapes.rows[t] = uint8_t(t == 2 || t == 3 || t == 5 ? lower_rows : kTileRows);
    }
    tile_configure(shapes);
    state().lower_rows = lower_rows;
  }

 private:
  struct State {
    int users = 0;
    int64_t lower_rows = 0;  // 0: not configured
  };
  static State& state() {
    thread_local State state;
    return state;
  }
};

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
