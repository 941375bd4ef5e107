// What a product fetches from memory while it computes: the operand of the next one.
#pragma once

#include "common/simd.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

// A stream of weights that is read once. With tiles it was measured into the nearest cache, 101 % of the bandwidth of an Intel processor
// with 48 KB of it; elsewhere into the second: 8 rows of 2048 bf16 at once fill the 32 KB of a Zen 4. There 32 tokens of the mini geometry
// took 35.8 ms so, 42.6 into the nearest; int8 15.7 and 28.5 ms.
#if defined(LLADA_CPU_LEVEL_amx)
inline void fetch(const void* p) { __builtin_prefetch(p); }
constexpr int64_t kRowsAhead = 1;
#else
inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }
constexpr int64_t kRowsAhead = 2;  // 35.4 -> 34.6 ms, one token 1.62 -> 1.47 ms
#endif

// Steps of k that one cache line of a row of T holds.
template <class T>
constexpr int64_t kLineSteps = 64 / sizeof(T) / kPackedDepth<T>;

// What is fetched from memory during a product: `rows` rows of `lines` cache lines each for every kLineSteps steps of k.
struct Ahead {
  const char* first = nullptr;
  int64_t row = 0, step = 0;  // bytes from row to row and from one kLineSteps to the next
  int64_t rows = 0, lines = 1;

  Ahead part(int64_t i, int64_t parts) const {
    if (rows == 0) return {};
    const int64_t begin = rows * i / parts;
    return {first + begin * row, row, step, rows * (i + 1) / parts - begin, lines};
  }
};

// Rows of T in the order of k.
template <class T>
inline Ahead rows_ahead(const T* first, int64_t ld, int64_t rows) {
  return {reinterpret_cast<const char*>(first), ld * int64_t(sizeof(T)), 64, rows, 1};
}

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
