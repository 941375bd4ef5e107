#include <algorithm>
#include <memory>
#include <vector>

#include "cached_block_attention/params.h"

#include "block_attention/cpu_tile.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

// Blocks of keys are counted from the start of the row's context and of the tile's new keys, never from the start of the batch, so
// that a row's result does not depend on the rows beside it.
template <class T>
void forward(const CachedBlockAttentionParams& p, const Parallel& parallel) {
  const int64_t d = p.head_dim, group = p.heads / p.kv_heads, max_rows = p.max_tile_queries * group;
  const int64_t q_stride = p.heads * d, k_stride = p.kv_heads * d;
  parallel.items(p.num_tiles * p.kv_heads, [&](ItemQueue& queue) {
    std::vector<float> q(max_rows * d), out(max_rows * d), scores(max_rows * kKeys), row_max(max_rows), row_sum(max_rows);
    std::unique_ptr<T[]> transposed(new T[kKeys * d]());
    for (int64_t item; queue.next(item);) {
      const int64_t index = p.order[item / p.kv_heads], head = item % p.kv_heads;
      const int32_t *tile = p.tiles + 7 * index, *pages = p.page_table + p.rows[index] * p.max_pages;
      const int64_t tokens = tile[1] - tile[0], rows = tokens * group;
      gather_rows(static_cast<const T*>(p.q) + tile[0] * q_stride + head * group * d, q_stride, tokens, group * d, p.scale, q.data());
      std::fill_n(out.begin(), rows * d, 0.f);
      std::fill_n(row_max.begin(), rows, -std::numeric_limits<float>::infinity());
      std::fill_n(row_sum.begin(), rows, 0.f);

      // pieces(f): f(first key of the block, keys, their K rows, their V rows) for each stretch of keys that is contiguous in memory.
      const auto step = [&](int64_t start, int64_t end, auto span, auto pieces) {
        const Columns c(start, start, end);
        pieces([&](int64_t at, int64_t n, const T* k, const T*) { transpose_keys(k, k_stride, n, d, transposed.get(), at); });
        gemm_nn(q.data(), d, 1, transposed.get(), kKeys, rows, c.width, d, scores.data(), kKeys);
        softmax_step(scores.data(), tokens, group, c.width, [&](int64_t t) { return span(t, c); }, row_max.data(), row_sum.data(),
                     out.data(), d);
        pieces([&](int64_t at, int64_t n, const T*, const T* v) {
          gemm_nn(scores.data() + at, kKeys, 1, v, k_stride, rows, d, n, out.data(), d, true);
        });
      };
      for (int64_t start = 0; start < tile[3]; start += kKeys) {
        const int64_t end = std::min<int64_t>(start + kKeys, tile[3]);
        step(start, end, [](int64_t, const Columns& c) { return Span{c.first, c.last}; }, [&](auto f) {
          for (int64_t key = start; key < end;) {
            const int64_t in_page = key % p.page_size, n = std::min(p.page_size - in_page, end - key);
            const int64_t place = (pages[key / p.page_size] * p.page_size + in_page) * k_stride + head * d;
            f(key - start, n, static_cast<const T*>(p.cache_k) + place, static_cast<const T*>(p.cache_v) + place);
            key += n;
          }
        });
      }
      for (int64_t start = tile[4]; start < tile[5]; start += kKeys) {
        const int64_t end = std::min<int64_t>(start + kKeys, tile[5]), place = start * k_stride + head * d;
        step(start, end, [&](int64_t t, const Columns& c) { return span_of(p.own + 2 * (tile[0] + t), c); }, [&](auto f) {
          f(0, end - start, static_cast<const T*>(p.k_new) + place, static_cast<const T*>(p.v_new) + place);
        });
      }
      softmax_finish(rows, d, row_max.data(), row_sum.data(), out.data());
      scatter_rows(out.data(), tokens, group * d, 1.f, static_cast<T*>(p.out) + tile[0] * q_stride + head * group * d, q_stride);
    }
  });
}

}  // namespace

void cached_block_attention(const CachedBlockAttentionParams& p, const Parallel& parallel) {
  p.bf16 ? forward<bf16>(p, parallel) : forward<float>(p, parallel);
}

}  // namespace llada::LLADA_CPU_LEVEL
