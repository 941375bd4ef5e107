// Checks gemm_packed of one CPU level, and of amx_emulated the stand-in for tiles. Values are small integers, so results are exact.
// Compiled and run by python_tests/test_cpu_levels.py.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "common/cpu_level.h"

#include "common/packed_gemm.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kGuard = -12345.f;

int value(int64_t i) { return int((i * 7919 + i / 5 * 31) % 9) - 4; }

// What is not part of A, B or C lies between their rows, before and behind them: NaN where it is read, kGuard where it is written.
template <class T>
void check(int64_t m, int64_t n, int64_t k, bool by_k, bool accumulate, int64_t skip) {
  const int64_t lda = k + 3, ldc = n + 5, all = k + 2 * skip;  // packed: k rows of B between `skip` others
  std::vector<T> a((m + 1) * lda, from_float<T>(kNan)), b((by_k ? n : all) * (by_k ? all : n), from_float<T>(kNan));
  std::vector<float> c((m + 2) * ldc, kGuard), expected = c;
  const auto at_a = [&](int64_t i, int64_t l) { return i * lda + l; };
  const auto at_b = [&](int64_t l, int64_t j) { return by_k ? j * all + skip + l : (skip + l) * n + j; };
  for (int64_t i = 0; i < m; ++i)
    for (int64_t l = 0; l < k; ++l) a[at_a(i, l)] = from_float<T>(float(value(i * 131 + l)));
  for (int64_t l = 0; l < k; ++l)
    for (int64_t j = 0; j < n; ++j) b[at_b(l, j)] = from_float<T>(float(value(j * 57 + l * 3 + 1)));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float& out = c[(i + 1) * ldc + j];
      out = accumulate ? float(i - j) : kNan;
      float sum = accumulate ? out : 0.f;
      for (int64_t l = 0; l < k; ++l) sum += to_float(a[at_a(i, l)]) * to_float(b[at_b(l, j)]);
      expected[(i + 1) * ldc + j] = sum;
    }
  std::vector<uint32_t> packed(packed_size<T>(n, all));
  pack(packed.data(), b.data(), by_k ? all : 1, by_k ? 1 : n, n, all);
  gemm_packed(a.data(), lda, m, packed.data() + skip / kPackedDepth<T> * kPanel, n, k, c.data() + ldc, ldc, accumulate,
              packed_size<T>(kPanel, all),
              Ahead{reinterpret_cast<const char*>(a.data()), lda * int64_t(sizeof(T)), 64, accumulate ? m : 0, 1});
  const auto compare = [&](const char* what) {
    for (size_t i = 0; i < c.size(); ++i) {
      if (c[i] == expected[i]) continue;
      std::printf("failed: %s m %ld n %ld k %ld by_k %d accumulate %d skip %ld: at %zu expected %g, got %g\n", what, long(m), long(n),
                  long(k), by_k, accumulate, long(skip), i, double(expected[i]), double(c[i]));
      std::exit(1);
    }
  };
  compare("gemm_packed");
  if (n % kLanes != 0 || accumulate || skip != 0) return;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) c[(i + 1) * ldc + j] = kNan;
  gemm_few_columns(a.data(), lda, m, packed.data(), n, k, c.data() + ldc, ldc);
  compare("gemm_few_columns");
}

template <class T>
void check_all() {
  for (int64_t m : {1, 5, 15, 16, 17, 31, 32, 33, 48, 70})
    for (int64_t n : {1, 16, 31, 32, 33, 64, 70})
      for (int64_t k : {1, 2, 7, 31, 32, 33, 61, 64, 90})
        for (int bits = 0; bits < 8; ++bits) check<T>(m, n, k, bits & 1, bits & 2, bits & 4 ? 6 : 0);
}

#if defined(LLADA_CPU_LEVEL_amx_emulated)
void expect(bool ok, const char* what) {
  if (ok) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

template <class F>
bool refuses(F&& f) {
  try {
    f();
  } catch (const std::logic_error&) {
    return true;
  }
  return false;
}

void check_tiles() {
  TileShapes shapes;  // C 2 x 3, A 2 x 2 pairs, B 2 pairs x 3
  for (int t : {0, 4, 6}) shapes.rows[t] = 2, shapes.row_bytes[t] = t == 4 ? 8 : 12;
  expect(refuses([] { tile_zero<0>(); }), "a tile before configuration is refused");
  tile_configure(shapes);
  expect(refuses([] { tile_zero<1>(); }), "a tile without a size is refused");
  const auto narrow = [](float x) { return from_float<bf16>(x); };
  bf16 a[3][4], b[3][6];
  float c[3][3];
  for (int i = 0; i < 12; ++i) a[i / 4][i % 4] = narrow(float(i + 1));
  for (int i = 0; i < 18; ++i) b[i / 6][i % 6] = narrow(float(i * i % 11));
  for (int i = 0; i < 9; ++i) c[i / 3][i % 3] = kGuard;
  tile_load<0>(c, sizeof c[0]);
  tile_zero<0>();
  tile_load<4>(a, sizeof a[0]);
  tile_load<6>(b, sizeof b[0]);
  tile_multiply<0, 4, 6>();
  tile_multiply<0, 4, 6>();
  tile_store<0>(c, sizeof c[0]);
  for (int m = 0; m < 3; ++m)
    for (int n = 0; n < 3; ++n) {
      float sum = 0;
      for (int k = 0; k < 4; ++k) sum += to_float(a[m][k]) * to_float(b[k / 2][2 * n + k % 2]);  // pairs of k lie side by side in B
      expect(c[m][n] == (m < 2 ? 2 * sum : kGuard), "C is twice A * B, and no row beyond the configured ones is written");
    }
  for (int row = 0; row < kTileRows; ++row)
    for (int byte = 0; byte < kTileBytes; ++byte)
      expect((row < 2 && byte < 8) || tiles().data[4][row][byte] == 0, "a load fills the rest of a tile with zeros");
  shapes.row_bytes[4] = 12;
  tile_configure(shapes);
  expect(tiles().data[0][0][0] == 0 && tiles().data[0][1][0] == 0, "a configuration clears the tiles");
  expect(refuses([] { tile_multiply<0, 4, 6>(); }), "sizes that do not match are refused");
  tile_release();
  expect(refuses([] { tile_zero<0>(); }), "a tile after its release is refused");
}
#endif

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL

int main() {
  using namespace llada::LLADA_CPU_LEVEL;
  if (!llada::cpu_supports(llada::CpuLevel::LLADA_CPU_LEVEL)) return std::puts("this machine has no such level"), 1;  // asks for tiles
#if defined(LLADA_CPU_LEVEL_amx_emulated)
  check_tiles();
#endif
  check_all<bf16>();
  check_all<float>();
#if defined(LLADA_CPU_LEVEL_amx_emulated)
  expect(refuses([] { tile_zero<0>(); }), "products release the tiles");
#endif
  std::puts("ok");
}
