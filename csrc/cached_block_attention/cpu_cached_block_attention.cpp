#include <algorithm>
#include <vector>

#include "cached_block_attention/params.h"

#include "block_attention/cpu_tile.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

// A long context is cut into parts for several threads. How depends on its own length only: a row's result is the same in any batch.
constexpr int64_t kPartKeys = 1024, kMaxParts = 8;

struct Part {
  int64_t tile, begin, end;  // of the context; the last part of a tile also has the new keys
  bool last;
  int64_t slot;  // in `partial`, per KV head; -1 if it is the only part
};

struct Parts {
  std::vector<Part> parts;
  std::vector<int64_t> split;  // first part of every tile with more than one
  int64_t slots = 0;

  explicit Parts(const CachedBlockAttentionParams& p) {
    for (int64_t i = 0; i < p.num_tiles; ++i) {
      const int64_t tile = p.order[i], context = p.tiles[7 * tile + 3];
      const int64_t count = std::clamp<int64_t>(context / kPartKeys, 1, kMaxParts);
      const int64_t keys = round_up((context + count - 1) / count, kKeys);
      if (keys < context) split.push_back(int64_t(parts.size()));
      int64_t begin = 0;
      do {
        const int64_t end = std::min(begin + keys, context);
        parts.push_back({tile, begin, end, end == context, keys < context ? slots++ : -1});
        begin = end;
      } while (begin < context);
    }
  }
};

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
        scores(max_rows * kKeys),
        out(max_rows * d),
        row_max(max_rows),
        row_sum(max_rows) {}

  // Blocks of keys are counted from the start of the part and of the row's new keys, never from the start of the batch.
  void attend(const Part& part, int64_t head) {
    const int32_t *tile = p.tiles + 7 * part.tile, *pages = p.page_table + p.rows[part.tile] * p.max_pages;
    const int64_t tokens = tile[1] - tile[0];
    gather(static_cast<const T*>(p.q) + tile[0] * q_stride + head * group * d, q_stride, tokens, group * d, q.data());
    clear(tokens * group);
    for (int64_t begin = part.begin; begin < part.end; begin += kKeys) {
      const int64_t end = std::min(begin + kKeys, part.end);
      for (int64_t key = begin; key < end;) {  // one page, or the piece of it that belongs to this block, at a time
        const int64_t in_page = key % p.page_size, n = std::min(p.page_size - in_page, end - key);
        const int64_t place = (pages[key / p.page_size] * p.page_size + in_page) * k_stride + head * d;
        gather_keys(p.cache_k, p.cache_v, place, key - begin, n);
        key += n;
      }
      step(tokens, Columns(begin, begin, end), [](int64_t, const Columns& c) { return Span{c.first, c.last}; });
    }
    for (int64_t begin = tile[4]; part.last && begin < tile[5]; begin += kKeys) {
      const int64_t end = std::min<int64_t>(begin + kKeys, tile[5]);
      gather_keys(p.k_new, p.v_new, begin * k_stride + head * d, 0, end - begin);
      step(tokens, Columns(begin, begin, end), [&](int64_t t, const Columns& c) { return span_of(p.own + 2 * (tile[0] + t), c); });
    }
  }

  void save(float* slot) const {
    std::copy(out.begin(), out.end(), slot);
    std::copy(row_max.begin(), row_max.end(), slot + max_rows * d);
    std::copy(row_sum.begin(), row_sum.end(), slot + max_rows * (d + 1));
  }

  // Merges the results of the parts, in their order.
  void merge(const Part* part, const float* partial, int64_t slot_stride) {
    const int64_t rows = (p.tiles[7 * part->tile + 1] - p.tiles[7 * part->tile]) * group;
    clear(rows);
    for (bool done = false; !done; done = part->last, ++part) {
      const float* from = partial + part->slot * slot_stride;
      for (int64_t r = 0; r < rows; ++r) {
        const float peak = from[max_rows * d + r], now = std::max(peak, row_max[r]);
        const float shrink = std::exp(row_max[r] - finite_peak(now)), factor = std::exp(peak - finite_peak(now));
        for (int64_t i = 0; i < d; ++i) out[r * d + i] = out[r * d + i] * shrink + from[r * d + i] * factor;
        row_sum[r] = row_sum[r] * shrink + from[max_rows * (d + 1) + r] * factor;
        row_max[r] = now;
      }
    }
  }

  void finish(int64_t index, int64_t head) {
    const int32_t* tile = p.tiles + 7 * index;
    const int64_t tokens = tile[1] - tile[0];
    softmax_finish(tokens * group, d, row_max.data(), row_sum.data(), out.data());
    scatter(out.data(), tokens, group * d, 1.f, static_cast<T*>(p.out) + tile[0] * q_stride + head * group * d, q_stride);
  }

 private:
  void clear(int64_t rows) {
    std::fill_n(out.begin(), rows * d, 0.f);
    std::fill_n(row_max.begin(), rows, -std::numeric_limits<float>::infinity());
    std::fill_n(row_sum.begin(), rows, 0.f);
  }

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
  std::vector<float> scores, out, row_max, row_sum;
};

template <class T>
void forward(const CachedBlockAttentionParams& p, const Parallel& parallel) {
  const Parts plan(p);
  // A part's unfinished result: out, row_max and row_sum of its rows.
  const int64_t slot_size = p.max_tile_queries * (p.heads / p.kv_heads) * (p.head_dim + 2), slot_stride = slot_size * p.kv_heads;
  std::vector<float> partial(plan.slots * slot_stride);
  parallel.items(int64_t(plan.parts.size()) * p.kv_heads, [&](ItemQueue& queue) {
    const TileScope tiles;
    Worker<T> worker(p);
    for (int64_t item; queue.next(item);) {
      const Part& part = plan.parts[item / p.kv_heads];
      const int64_t head = item % p.kv_heads;
      worker.attend(part, head);
      part.slot < 0 ? worker.finish(part.tile, head) : worker.save(partial.data() + part.slot * slot_stride + head * slot_size);
    }
  });
  parallel.items(int64_t(plan.split.size()) * p.kv_heads, [&](ItemQueue& queue) {
    Worker<T> worker(p);
    for (int64_t item; queue.next(item);) {
      const Part* first = &plan.parts[plan.split[item / p.kv_heads]];
      const int64_t head = item % p.kv_heads;
      worker.merge(first, partial.data() + head * slot_size, slot_stride);
      worker.finish(first->tile, head);
    }
  });
}

}  // namespace

void cached_block_attention(const CachedBlockAttentionParams& p, const Parallel& parallel) {
  p.bf16 ? forward<bf16>(p, parallel) : forward<float>(p, parallel);
}

}  // namespace llada::LLADA_CPU_LEVEL
