// What a product fetches from memory while it computes: the operand of the next one.
#pragma once

#include "common/simd.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

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
