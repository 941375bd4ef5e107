#include <type_traits>
#include <vector>

#include "lm_head_unmask/params.h"
#include "threshold_unmask/parts.h"

#include "grouped_gemm/tiles.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

constexpr int64_t kGroup = 256;   // positions whose logits of one part exist at once: 1 MiB
constexpr int64_t kColumns = 64;  // of them, multiplied with kStepRows rows of lm_head at a time
// Floats from one position's logits to the next: rows of 4 KB share one set of 12 lines of the nearest cache, and 16 are transposed at a
// time. 32 positions 31.6 -> 29.5 ms, 256 positions 207 -> 196 ms.
constexpr int64_t kLogitsRow = kPart + kLanes;
constexpr int64_t kDotPositions = 8;  // up to so many rows of hidden are not worth packing

// lm_head is read once, as it lies: its rows are the left operand and the packed hidden states, which stay in a cache, the right one.
template <class T>
void reduce_products(const LmHeadUnmaskParams& p, PartSum* sums, Best* best, const Parallel& parallel) {
  const T *hidden = static_cast<const T*>(p.hidden), *lm_head = static_cast<const T*>(p.lm_head);
  const int64_t positions = p.rules.rows * p.rules.length, parts = ceil_div(p.rules.vocab, kPart), width = p.width;
  const bool packed = positions > kDotPositions;
  const auto right = scratch<uint32_t>(packed ? packed_size<T>(positions, width) : 0);
  if (packed) pack(right.get(), hidden, width, 1, positions, width);
  parallel.items(parts, [&](ItemQueue& queue) {
    const int64_t all = least(kGroup, ceil_div(positions, kLanes) * kLanes), wide = least(kColumns, all);
    const auto tile = scratch<float>(kStepRows * wide), logits = scratch<float>(all * kLogitsRow);
    const int64_t copied = width + 64 / sizeof(T);  // from row to row of a copy: other sets for rows of 4 KB
    const auto copy = scratch<T>(positions > kColumns ? kStepRows * copied : 0);
    for (int64_t part; queue.next(part);) {
      const int64_t first = part * kPart, ids = least(kPart, p.rules.vocab - first);
      const T* weights = lm_head + first * width;
      for (int64_t t = 0; t < positions; t += kGroup) {
        const int64_t n = least(kGroup, positions - t);
        if (!packed) gemm_stream(hidden, width, n, weights, ids, width, logits.get(), kLogitsRow);
        for (int64_t i = 0; packed && i < ids; i += kStepRows) {
          const int64_t m = least(kStepRows, ids - i);
          const T* rows = weights + i * width;
          int64_t ld = width;
          Ahead ahead = rows_ahead(rows + m * width, width, i + 2 * kStepRows <= ids ? kStepRows : 0);
          if (n > kColumns) {  // read more than once
            for (int64_t r = 0; r < m; ++r) std::memcpy(copy.get() + r * copied, rows + r * width, size_t(width) * sizeof(T));
            rows = copy.get(), ld = copied;
          }
          for (int64_t j = 0; j < n; j += kColumns, ahead.rows = 0) {
            const int64_t columns = ceil_div(least(kColumns, n - j), kLanes) * kLanes;  // behind n: zeros
            gemm_few_columns(rows, ld, m, right.get() + packed_size<T>(t + j, width), columns, width, tile.get(), wide, ahead);
            transpose_rows([&](int64_t r) { return tile.get() + r * wide; }, m, columns, logits.get() + j * kLogitsRow + i, kLogitsRow);
          }
        }
        for (int64_t j = 0; j < n; ++j) {
          float* x = logits.get() + j * kLogitsRow;
          for (int64_t i = 0; i < ids; i += kLanes)  // a row has room for whole vectors
            store(x + i, round_to<T>(load(x + i)));
          const int64_t at = (t + j) * parts + part;
          sums[at] = reduce_part(x, ids, first, p.rules.mask_token_id, best[at]);
        }
      }
    }
  });
}

}  // namespace

void lm_head_unmask(const LmHeadUnmaskParams& p, const Parallel& parallel) {
  const int64_t parts = ceil_div(p.rules.vocab, kPart);
  std::vector<PartSum> sums(size_t(p.rules.rows * p.rules.length * parts));
  std::vector<Best> best(sums.size());
  p.rules.bf16 ? reduce_products<bf16>(p, sums.data(), best.data(), parallel)
               : reduce_products<float>(p, sums.data(), best.data(), parallel);
  decide(p.rules, sums.data(), best.data(), parts, parallel);
}

}  // namespace llada::LLADA_CPU_LEVEL
