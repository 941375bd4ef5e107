#include <algorithm>
#include <atomic>
#include <memory>
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
  std::vector<int64_t> first;  // of every part, the first of its tile
  int64_t slots = 0;

  explicit Parts(const CachedBlockAttentionParams& p) {
    for (int64_t i = 0; i < p.num_tiles; ++i) {
      const int64_t tile = p.order[i], context = p.tiles[7 * tile + 3];
      const int64_t count = std::clamp<int64_t>(context / kPartKeys, 1, kMaxParts);
      const int64_t keys = round_up((context + count - 1) / count, kKeys);
      const int64_t first_part = int64_t(parts.size());
      int64_t begin = 0;
      do {
        const int64_t end = std::min(begin + keys, context);
        parts.push_back({tile, begin, end, end == context, keys < context ? slots++ : -1});
        first.push_back(first_part);
        begin = end;
      } while (begin < context);
    }
  }
};

template <class E>
std::unique_ptr<E[]> room(int64_t n) {
  return std::make_unique_for_overwrite<E[]>(size_t(n));
}

// The rows of a tile and a head: their queries, and what is known of them after some keys.
template <class T>
struct Rows {
  Rows(int64_t max_rows, int64_t d)
      : q(room<Operand<T>>(max_rows * d)), out(room<float>(max_rows * d)), max(room<float>(max_rows)), sum(room<float>(max_rows)) {}
  void clear(int64_t rows, int64_t d) {
    std::fill_n(out.get(), rows * d, 0.f);
    std::fill_n(max.get(), rows, -std::numeric_limits<float>::infinity());
    std::fill_n(sum.get(), rows, 0.f);
  }
  std::unique_ptr<Operand<T>[]> q;
  std::unique_ptr<float[]> out, max, sum;
};

// Heads of keys that one worker packs together: a head's keys are short strips of memory (256 bytes), which come with half of the
// bandwidth.
constexpr int64_t kMaxHeads = 4;

// One worker: the queries of a tile and `heads` KV heads against one step of keys after the other.
template <class T>
class Worker {
 public:
  Worker(const CachedBlockAttentionParams& params, int64_t heads)
      : p(params),
        d(p.head_dim),
        group(p.heads / p.kv_heads),
        q_stride(p.heads * d),
        k_stride(p.kv_heads * d),
        max_rows(p.max_tile_queries * group),
        step_size(step_tokens<T>(p.max_tile_queries, group)),
        whole_panels(p.page_size % kPanel == 0),
        size_k(packed_size<T>(kStepKeys<T>, d)),
        size_v(packed_size<T>(d, kStepKeys<T>)),
        probabilities(room<Operand<T>>(step_size * group * kStepKeys<T>)),
        scores(room<float>(step_size * group * kStepKeys<T>)),
        k(room<T>(whole_panels ? 0 : kStepKeys<T> * d)),
        v(room<T>(whole_panels ? 0 : kStepKeys<T> * d)),
        packed_k(room<uint32_t>(heads * size_k)),
        packed_v(room<uint32_t>(heads * size_v)) {
    for (int64_t h = 0; h < heads; ++h) rows.emplace_back(max_rows, d);
  }

  // Steps of keys are counted from the start of the part and of the row's new keys, never from the start of the batch.
  void attend(const Part& part, int64_t head, int64_t heads) {
    const int32_t *tile = p.tiles + 7 * part.tile, *pages = p.page_table + p.rows[part.tile] * p.max_pages;
    const int64_t tokens = tile[1] - tile[0];
    for (int64_t h = 0; h < heads; ++h) {
      const T* q = static_cast<const T*>(p.q) + tile[0] * q_stride + (head + h) * group * d;
      gather(q, q_stride, tokens, group * d, rows[h].q.get());
      rows[h].clear(tokens * group, d);
    }
    const auto all_heads = [&](auto&& f) {
      for (int64_t h = 0; h < heads; ++h) f(h);
    };
    for (int64_t begin = part.begin; begin < part.end; begin += kStepKeys<T>) {
      const int64_t end = std::min(begin + kStepKeys<T>, part.end);
      const auto pieces = [&](auto&& f) {  // pages, or pieces of them that belong to this step
        for (int64_t key = begin, n; key < end; key += n) {
          const int64_t in_page = key % p.page_size;
          n = std::min(p.page_size - in_page, end - key);
          f((pages[key / p.page_size] * p.page_size + in_page) * k_stride + head * d, key - begin, n);
        }
      };
      const T *cache_k = static_cast<const T*>(p.cache_k), *cache_v = static_cast<const T*>(p.cache_v);
      if (whole_panels)
        pieces([&](int64_t place, int64_t to, int64_t n) {
          all_heads([&](int64_t h) { pack_keys(h, cache_k + place + h * d, cache_v + place + h * d, k_stride, to, n, end - begin); });
        });
      else
        all_heads([&](int64_t h) {
          pieces([&](int64_t place, int64_t to, int64_t n) {
            gather_rows(cache_k + place + h * d, n, k.get() + to * d);
            gather_rows(cache_v + place + h * d, n, v.get() + to * d);
          });
          pack_keys(h, k.get(), v.get(), d, 0, end - begin, end - begin);
        });
      all_heads(
          [&](int64_t h) { step(h, tokens, Columns(begin, begin, end), [](int64_t, const Columns& c) { return Span{c.first, c.last}; }); });
    }
    for (int64_t begin = tile[4]; part.last && begin < tile[5]; begin += kStepKeys<T>) {
      const int64_t end = std::min<int64_t>(begin + kStepKeys<T>, tile[5]), place = begin * k_stride + head * d;
      const T *new_k = static_cast<const T*>(p.k_new) + place, *new_v = static_cast<const T*>(p.v_new) + place;
      all_heads([&](int64_t h) {
        pack_keys(h, new_k + h * d, new_v + h * d, k_stride, 0, end - begin, end - begin);
        step(h, tokens, Columns(begin, begin, end), [&](int64_t t, const Columns& c) { return span_of(p.own + 2 * (tile[0] + t), c); });
      });
    }
  }

  void save(int64_t h, float* slot) const {
    std::copy_n(rows[h].out.get(), max_rows * d, slot);
    std::copy_n(rows[h].max.get(), max_rows, slot + max_rows * d);
    std::copy_n(rows[h].sum.get(), max_rows, slot + max_rows * (d + 1));
  }

  // Merges the results of the parts, in their order.
  void merge(int64_t h, const Part* part, const float* partial, int64_t slot_stride) {
    Rows<T>& to = rows[h];
    const int64_t count = (p.tiles[7 * part->tile + 1] - p.tiles[7 * part->tile]) * group;
    to.clear(count, d);
    for (bool done = false; !done; done = part->last, ++part) {
      const float* from = partial + part->slot * slot_stride;
      for (int64_t r = 0; r < count; ++r) {
        const float peak = from[max_rows * d + r], now = std::max(peak, to.max[r]);
        const float shrink = std::exp(to.max[r] - finite_peak(now)), factor = std::exp(peak - finite_peak(now));
        float* out = to.out.get() + r * d;
        for (int64_t i = 0; i < d; ++i) out[i] = out[i] * shrink + from[r * d + i] * factor;
        to.sum[r] = to.sum[r] * shrink + from[max_rows * (d + 1) + r] * factor;
        to.max[r] = now;
      }
    }
  }

  void finish(int64_t h, int64_t index, int64_t head) {
    const int32_t* tile = p.tiles + 7 * index;
    const int64_t tokens = tile[1] - tile[0];
    softmax_finish(tokens * group, d, rows[h].max.get(), rows[h].sum.get(), rows[h].out.get());
    scatter(rows[h].out.get(), tokens, group * d, 1.f, static_cast<T*>(p.out) + tile[0] * q_stride + head * group * d, q_stride);
  }

 private:
  void gather_rows(const T* from, int64_t n, T* to) const {
    for (int64_t i = 0; i < n; ++i) std::memcpy(to + i * d, from + i * k_stride, size_t(d) * sizeof(T));
  }

  // n of the `all` keys of a step, from column `to`, whole panels, on.
  void pack_keys(int64_t h, const T* from_k, const T* from_v, int64_t stride, int64_t to, int64_t n, int64_t all) {
    pack(packed_k.get() + h * size_k + packed_size<T>(to, d), from_k, stride, 1, n, d);
    pack(packed_v.get() + h * size_v + to / kPackedDepth<T> * kPanel, from_v, 1, stride, d, n, packed_size<T>(kPanel, all));
  }

  template <class SpanOf>
  void step(int64_t h, int64_t tokens, const Columns& c, SpanOf span) {
    for (int64_t t0 = 0; t0 < tokens; t0 += step_size) {
      const int64_t count = std::min(step_size, tokens - t0), n = count * group, r = t0 * group;
      float* out = rows[h].out.get() + r * d;
      gemm_packed(rows[h].q.get() + r * d, d, n, packed_k.get() + h * size_k, c.width, d, scores.get(), kStepKeys<T>);
      softmax_step(
          scores.get(), probabilities.get(), kStepKeys<T>, count, group, c.width, p.scale, [&](int64_t t) { return span(t0 + t, c); },
          rows[h].max.get() + r, rows[h].sum.get() + r, out, d);
      gemm_packed(probabilities.get(), kStepKeys<T>, n, packed_v.get() + h * size_v, d, c.last, out, d, true);
    }
  }

  const CachedBlockAttentionParams& p;
  const int64_t d, group, q_stride, k_stride, max_rows, step_size;
  const bool whole_panels;  // of pages: they are packed as they lie
  const int64_t size_k, size_v;
  std::unique_ptr<Operand<T>[]> probabilities;
  std::unique_ptr<float[]> scores;
  std::unique_ptr<T[]> k, v;
  std::unique_ptr<uint32_t[]> packed_k, packed_v;
  std::vector<Rows<T>> rows;
};

template <class T>
void forward(const CachedBlockAttentionParams& p, const Parallel& parallel) {
  const Parts plan(p);
  // A part's unfinished result: out, row_max and row_sum of its rows.
  const int64_t slot_size = p.max_tile_queries * (p.heads / p.kv_heads) * (p.head_dim + 2), slot_stride = slot_size * p.kv_heads;
  const auto partial = room<float>(plan.slots * slot_stride);
  // As many heads together as leave every thread several items.
  const int64_t parts = int64_t(plan.parts.size());
  int64_t heads = std::min(kMaxHeads, p.kv_heads);
  while (heads > 1 && (p.kv_heads % heads != 0 || parts * (p.kv_heads / heads) < 4 * parallel.num_threads())) --heads;
  const int64_t groups = p.kv_heads / heads;
  std::vector<std::atomic<int64_t>> left(size_t(plan.parts.size() * groups));  // parts of the tile that are not finished, at its first
  for (int64_t i = 0; i < parts; ++i)
    for (int64_t g = 0; g < groups; ++g) left[size_t(plan.first[size_t(i)] * groups + g)].fetch_add(1, std::memory_order_relaxed);
  parallel.items(parts * groups, [&](ItemQueue& queue) {
    const TileScope tiles;
    Worker<T> worker(p, heads);
    for (int64_t item; queue.next(item);) {
      const int64_t index = item / groups, head = item % groups * heads, first = plan.first[size_t(index)];
      const Part& part = plan.parts[size_t(index)];
      worker.attend(part, head, heads);
      if (part.slot < 0) {
        for (int64_t h = 0; h < heads; ++h) worker.finish(h, part.tile, head + h);
        continue;
      }
      for (int64_t h = 0; h < heads; ++h) worker.save(h, partial.get() + part.slot * slot_stride + (head + h) * slot_size);
      // Who finishes the last part merges all of them.
      if (left[size_t(first * groups + item % groups)].fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
      for (int64_t h = 0; h < heads; ++h) {
        worker.merge(h, &plan.parts[size_t(first)], partial.get() + (head + h) * slot_size, slot_stride);
        worker.finish(h, part.tile, head + h);
      }
    }
  });
}

}  // namespace

void cached_block_attention(const CachedBlockAttentionParams& p, const Parallel& parallel) {
  p.bf16 ? forward<bf16>(p, parallel) : forward<float>(p, parallel);
}

}  // namespace llada::LLADA_CPU_LEVEL
