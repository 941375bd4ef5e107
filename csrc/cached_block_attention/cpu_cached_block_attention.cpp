#include <algorithm>
#include <vector>

#include "cached_block_attention/params.h"

#include "block_attention/cpu_tile.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

// One worker: a tile's queries against one block of keys after the other.
template <class T>
class Worker {
 public:
  explicit Worker(const CachedBlockAttentionParams& params)
      : p(params),
        d(p.head_dim),
        group(p.heads / p.kv_heads),
        q_stride(p.heads * d),
        k_stride(p.kv_heads * d),
        max_rows(p.max_tile_queries * group),
        q(max_rows * d),
        probabilities(max_rows * kKeys),
        k(kKeys * d),
        v(kKeys * d),
        packed_k(packed_size<Operand<T>>(kKeys, d)),
        packed_v(packed_size<Operand<T>>(d, kKeys)),
        out(max_rows * d),
        scores(max_rows * kKeys),
        row_max(max_rows),
        row_sum(max_rows) {}

  // Blocks of keys are counted from the start of the row's context and of its new keys, never from the start of the batch, so that
  // a row's result does not depend on the rows beside it.
  void attend(int64_t index, int64_t head) {
    const int32_t *tile = p.tiles + 7 * index, *pages = p.page_table + p.rows[index] * p.max_pages;
    const int64_t tokens = tile[1] - tile[0], rows = tokens * group, at = tile[0] * q_stride + head * group * d;
    gather(static_cast<const T*>(p.q) + at, q_stride, tokens, group * d, q.data());
    std::fill_n(out.begin(), rows * d, 0.f);
    std::fill_n(row_max.begin(), rows, -std::numeric_limits<float>::infinity());
    std::fill_n(row_sum.begin(), rows, 0.f);
    for (int64_t begin = 0; begin < tile[3]; begin += kKeys) {
      const int64_t end = std::min<int64_t>(begin + kKeys, tile[3]);
      for (int64_t key = begin; key < end;) {  // one page, or the part of it that belongs to this block, at a time
        const int64_t in_page = key % p.page_size, n = std::min(p.page_size - in_page, end - key);
        const int64_t place = (pages[key / p.page_size] * p.page_size + in_page) * k_stride + head * d;
        gather_keys(p.cache_k, p.cache_v, place, key - begin, n);
        key += n;
      }
      step(tokens, Columns(begin, begin, end), [](int64_t, const Columns& c) { return Span{c.first, c.last}; });
    }
    for (int64_t begin = tile[4]; begin < tile[5]; begin += kKeys) {
      const int64_t end = std::min<int64_t>(begin + kKeys, tile[5]);
      gather_keys(p.k_new, p.v_new, begin * k_stride + head * d, 0, end - begin);
      step(tokens, Columns(begin, begin, end), [&](int64_t t, const Columns& c) { return span_of(p.own + 2 * (tile[0] + t), c); });
    }
    softmax_finish(rows, d, row_max.data(), row_sum.data(), out.data());
    scatter(out.data(), tokens, group * d, 1.f, static_cast<T*>(p.out) + at, q_stride);
  }

 private:
  void gather_keys(const void* from_k, const void* from_v, int64_t place, int64_t to, int64_t n) {
    gather(static_cast<const T*>(from_k) + place, k_stride, n, d, k.data() + to * d);
    gather(static_cast<const T*>(from_v) + place, k_stride, n, d, v.data() + to * d);
  }

  template <class SpanOf>
  void step(int64_t tokens, const Columns& c, SpanOf span) {
    const int64_t rows = tokens * group, n = c.last;
    pack(packed_k.data(), k.data(), d, 1, n, d);
    gemm_packed(q.data(), d, rows, packed_k.data(), c.width, d, scores.data(), kKeys);
    softmax_step(
        scores.data(), probabilities.data(), tokens, group, c.width, p.scale, [&](int64_t t) { return span(t, c); }, row_max.data(),
        row_sum.data(), out.data(), d);
    pack(packed_v.data(), v.data(), 1, d, d, n);
    gemm_packed(probabilities.data(), kKeys, rows, packed_v.data(), d, n, out.data(), d, true);
  }

  const CachedBlockAttentionParams& p;
  const int64_t d, group, q_stride, k_stride, max_rows;
  std::vector<Operand<T>> q, probabilities, k, v;
  std::vector<uint32_t> packed_k, packed_v;
  std::vector<float> out, scores, row_max, row_sum;
};

template <class T>
void forward(const CachedBlockAttentionParams& p, const Parallel& parallel) {
  parallel.items(p.num_tiles * p.kv_heads, [&](ItemQueue& queue) {
    Worker<T> worker(p);
    for (int64_t item; queue.next(item);) worker.attend(p.order[item / p.kv_heads], item % p.kv_heads);
  });
}

}  // namespace

void cached_block_attention(const CachedBlockAttentionParams& p, const Parallel& parallel) {
  p.bf16 ? forward<bf16>(p, parallel) : forward<float>(p, parallel);
}

}  // namespace llada::LLADA_CPU_LEVEL
