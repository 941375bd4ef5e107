#include <algorithm>
#include <memory>
#include <vector>

#include "block_attention/params.h"

#include "block_attention/cpu_tile.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

static_assert(kKeys == kAttentionKeyBlock && kKeys % kPanel == 0);

// One tile of the plan.
struct Tile {
  int64_t begin, tokens;
  const int32_t* hulls;  // context_begin, context_end, own_begin, own_end
  bool uniform;
  Tile(const BlockAttentionParams& p, int64_t index) {
    const int32_t* t = p.tiles + 7 * index;
    begin = t[0];
    tokens = t[1] - t[0];
    hulls = t + 2;
    uniform = t[6] != 0;
  }
};

// K or V, packed once per KV head and block of kStepKeys keys, as the right operand of a product with queries or with probabilities.
template <class T>
class PackedKeys {
 public:
  // by_dim: B(k = dim, n = key), for scores. Else B(k = key, n = dim), for sums over keys.
  PackedKeys(const BlockAttentionParams& p, const void* x, bool by_dim, const Parallel& parallel)
      : by_dim_(by_dim),
        d_(p.head_dim),
        num_keys_(p.num_keys),
        blocks_((p.num_keys + kStepKeys<T> - 1) / kStepKeys<T>),
        size_(by_dim ? packed_size<T>(kStepKeys<T>, d_) : packed_size<T>(d_, kStepKeys<T>)),
        data_(new uint32_t[p.kv_heads * blocks_ * size_]) {
    const int64_t stride = p.kv_heads * d_;
    parallel.ranges(p.kv_heads * blocks_, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* from = static_cast<const T*>(x) + i % blocks_ * kStepKeys<T> * stride + i / blocks_ * d_;
        uint32_t* to = data_.get() + i * size_;
        const int64_t n = keys_in(i % blocks_);
        by_dim ? pack(to, from, stride, 1, n, d_) : pack(to, from, 1, stride, d_, n);
      }
    });
  }

  // scores[rows][width] = rows of x times the keys of columns c.
  void multiply_dims(const Operand<T>* x, int64_t rows, int64_t head, int64_t block, const Columns& c, float* scores) const {
    const uint32_t* panel = at(head, block) + (c.base - block * kStepKeys<T>) / kPanel * packed_size<T>(kPanel, d_);
    gemm_packed(x, d_, rows, panel, c.width, d_, scores, kStepKeys<T>);
  }

  // out[rows][d] += p[rows][keys of columns c] times these keys.
  void add_keys(const Operand<T>* p, int64_t rows, int64_t head, int64_t block, const Columns& c, float* out) const {
    const int64_t from = c.first / kPackedDepth<T> * kPackedDepth<T>;  // a pair may start at a hidden key: its p is 0
    const int64_t key = c.base - block * kStepKeys<T> + from, panel = packed_size<T>(kPanel, keys_in(block));
    gemm_packed(p + from, kStepKeys<T>, rows, at(head, block) + key / kPackedDepth<T> * kPanel, d_, c.last - from, out, d_, true, panel);
  }

 private:
  int64_t keys_in(int64_t block) const { return std::min(kStepKeys<T>, num_keys_ - block * kStepKeys<T>); }
  const uint32_t* at(int64_t head, int64_t block) const { return data_.get() + (head * blocks_ + block) * size_; }

  const bool by_dim_;
  const int64_t d_, num_keys_, blocks_, size_;
  const std::unique_ptr<uint32_t[]> data_;
};

// Sizes and addresses that the kernels of one call share.
template <class T>
struct Call {
  const BlockAttentionParams& p;
  const int64_t d, group, piece, rows, q_stride, k_stride, blocks;

  explicit Call(const BlockAttentionParams& params)
      : p(params),
        d(p.head_dim),
        group(p.heads / p.kv_heads),
        piece(group * d),
        rows(round_up(p.max_tile_queries * group, kPanel)),
        q_stride(p.heads * d),
        k_stride(p.kv_heads * d),
        blocks((p.num_keys + kStepKeys<T> - 1) / kStepKeys<T>) {}

  const T* queries(const void* x, const Tile& tile, int64_t head) const {
    return static_cast<const T*>(x) + tile.begin * q_stride + head * piece;
  }
  T* queries(void* x, const Tile& tile, int64_t head) const { return static_cast<T*>(x) + tile.begin * q_stride + head * piece; }
  int64_t key(int64_t key, int64_t head) const { return key * k_stride + head * d; }
  // Where the scalars of the tile's first row lie in a [num_queries, heads] array.
  int64_t scalar(const Tile& tile, int64_t head) const { return tile.begin * p.heads + head * group; }

  // lse per row, +inf where it is -inf (no key seen), so that the probabilities are 0; likewise behind the last row.
  void gather_lse(const Tile& tile, int64_t head, float* lse) const {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    gather_scalars(p.lse + scalar(tile, head), p.heads, tile.tokens, group, lse);
    for (int64_t r = 0; r < rows; ++r)
      if (r >= tile.tokens * group || lse[r] == -kInfinity) lse[r] = kInfinity;
  }

  // f(columns, block, span of a token) for the part of a tile's context (which = 0) or own (1) hull in each block of keys.
  template <class F>
  void visit(const Tile& tile, int which, F&& f) const {
    const int64_t begin = tile.hulls[2 * which], end = tile.hulls[2 * which + 1];
    const int32_t* intervals = (which ? p.own : p.context) + 2 * tile.begin;
    for (int64_t b = begin / kStepKeys<T>; b * kStepKeys<T> < end && begin < end; ++b) {
      const Columns columns(b * kStepKeys<T>, std::max(begin, b * kStepKeys<T>), std::min(end, (b + 1) * kStepKeys<T>));
      f(columns, b, [&columns, intervals, uniform = tile.uniform](int64_t t) {
        return uniform ? Span{columns.first, columns.last} : span_of(intervals + 2 * t, columns);
      });
    }
  }
};

template <class T>
void forward(const BlockAttentionParams& p, const Parallel& parallel) {
  const Call<T> call(p);
  const PackedKeys<T> keys(p, p.k, true, parallel), values(p, p.v, false, parallel);
  const int64_t d = call.d, group = call.group;
  parallel.items(p.num_tiles * p.kv_heads, [&](ItemQueue& queue) {
    const TileScope tiles;
    const int64_t step = step_tokens<T>(p.max_tile_queries, group), step_rows = round_up(step * group, kPanel);
    std::vector<Operand<T>> q(call.rows * d), probabilities(step_rows * kStepKeys<T>);
    std::vector<float> out(call.rows * d), scores(step_rows * kStepKeys<T>), row_max(call.rows), row_sum(call.rows);
    for (int64_t item; queue.next(item);) {
      const Tile tile(p, p.order[item / p.kv_heads]);
      const int64_t head = item % p.kv_heads, rows = tile.tokens * group;
      gather(call.queries(p.q, tile, head), call.q_stride, tile.tokens, call.piece, q.data());
      std::fill_n(out.begin(), rows * d, 0.f);
      std::fill_n(row_max.begin(), rows, -std::numeric_limits<float>::infinity());
      std::fill_n(row_sum.begin(), rows, 0.f);
      for (int which = 0; which < 2; ++which)
        call.visit(tile, which, [&](const Columns& c, int64_t block, auto span) {
          for (int64_t t0 = 0; t0 < tile.tokens; t0 += step) {
            const int64_t tokens = std::min(step, tile.tokens - t0), r = t0 * group;
            keys.multiply_dims(q.data() + r * d, tokens * group, head, block, c, scores.data());
            softmax_step(
                scores.data(), probabilities.data(), kStepKeys<T>, tokens, group, c.width, p.scale, [&](int64_t t) { return span(t0 + t); },
                row_max.data() + r, row_sum.data() + r, out.data() + r * d, d);
            values.add_keys(probabilities.data(), tokens * group, head, block, c, out.data() + r * d);
          }
        });
      softmax_finish(rows, d, row_max.data(), row_sum.data(), out.data());
      scatter(out.data(), tile.tokens, call.piece, 1.f, call.queries(p.out, tile, head), call.q_stride);
      float* lse = p.lse + call.scalar(tile, head);
      for (int64_t r = 0; r < rows; ++r) lse[r / group * p.heads + r % group] = row_sum[r];
    }
  });
}

// delta = sum(grad_out * out) per query and head.
template <class T>
void row_products(const BlockAttentionBackwardParams& b, const Call<T>& call, float* delta, const Parallel& parallel) {
  const int64_t d = call.d;
  parallel.ranges(b.forward.num_queries * b.forward.heads, 4096 / (d + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T *x = static_cast<const T*>(b.grad_out) + r * d, *y = static_cast<const T*>(b.forward.out) + r * d;
      Vec sum{};
      for (int64_t i = 0; i < d; i += kLanes) sum += load_vector(x, i, d) * load_vector(y, i, d);
      delta[r] = reduce_add(sum);
    }
  });
}

// Query-stationary: grad_q = scale * sum over keys of dS k, with dS = P * (grad_out v - delta).
template <class T>
void backward_queries(const BlockAttentionBackwardParams& b, const Call<T>& call, const float* delta, const Parallel& parallel) {
  const BlockAttentionParams& p = b.forward;
  const int64_t d = call.d, group = call.group;
  const PackedKeys<T> keys(p, p.k, true, parallel), values(p, p.v, true, parallel), key_sums(p, p.k, false, parallel);
  parallel.items(p.num_tiles * p.kv_heads, [&](ItemQueue& queue) {
    const TileScope tiles;
    const int64_t step = step_tokens<T>(p.max_tile_queries, group), step_rows = round_up(step * group, kPanel);
    std::vector<Operand<T>> q(call.rows * d), grad_out(call.rows * d), score_grads(step_rows * kStepKeys<T>);
    std::vector<float> scores(step_rows * kStepKeys<T>), grad_p(step_rows * kStepKeys<T>), grad_q(call.rows * d), lse(call.rows),
        deltas(call.rows);
    for (int64_t item; queue.next(item);) {
      const Tile tile(p, p.order[item / p.kv_heads]);
      const int64_t head = item % p.kv_heads, rows = tile.tokens * group;
      gather(call.queries(p.q, tile, head), call.q_stride, tile.tokens, call.piece, q.data());
      gather(call.queries(b.grad_out, tile, head), call.q_stride, tile.tokens, call.piece, grad_out.data());
      call.gather_lse(tile, head, lse.data());
      gather_scalars(delta + call.scalar(tile, head), p.heads, tile.tokens, group, deltas.data());
      std::fill_n(grad_q.begin(), rows * d, 0.f);
      for (int which = 0; which < 2; ++which)
        call.visit(tile, which, [&](const Columns& c, int64_t block, auto span) {
          for (int64_t t0 = 0; t0 < tile.tokens; t0 += step) {
            const int64_t tokens = std::min(step, tile.tokens - t0), first = t0 * group;
            keys.multiply_dims(q.data() + first * d, tokens * group, head, block, c, scores.data());
            values.multiply_dims(grad_out.data() + first * d, tokens * group, head, block, c, grad_p.data());
            for (int64_t t = 0; t < tokens; ++t) {
              const Span seen = span(t0 + t);
              for (int64_t r = t * group; r < (t + 1) * group; ++r) {
                float *s = scores.data() + r * kStepKeys<T>, *g = grad_p.data() + r * kStepKeys<T>;
                for (int64_t i = 0; i < c.width; i += kLanes)
                  store(s + i, exp_of_negative(load(s + i) * p.scale - lse[first + r]) * (load(g + i) - deltas[first + r]));
                hide(s, seen, c.width, 0.f);
                for (int64_t i = 0; i < c.width; i += kLanes) store_operand(score_grads.data() + r * kStepKeys<T> + i, load(s + i));
              }
            }
            key_sums.add_keys(score_grads.data(), tokens * group, head, block, c, grad_q.data() + first * d);
          }
        });
      scatter(grad_q.data(), tile.tokens, call.piece, p.scale, call.queries(b.grad_q, tile, head), call.q_stride);
    }
  });
}

// Zeros of the transposed P and dS [keys of c][stride] where a query of a tile that is not uniform does not see the key.
template <class P, class SpanOf>
void hide_columns(P* p, P* score_grads, int64_t stride, int64_t tokens, int64_t group, const Columns& c, SpanOf span) {
  for (int64_t t = 0; t < tokens; ++t) {
    const Span seen = span(t);
    for (int64_t j = c.first; j < c.last; ++j) {
      if (j >= seen.first && j < seen.last) continue;
      std::fill_n(p + (j - c.first) * stride + t * group, group, P{});
      std::fill_n(score_grads + (j - c.first) * stride + t * group, group, P{});
    }
  }
}

// Key-stationary: grad_v = P^T grad_out and grad_k = scale * dS^T q, over the query tiles that the plan lists for a block of keys.
// Scores are computed transposed, so that P^T and dS^T come out as left operands.
template <class T>
void backward_keys(const BlockAttentionBackwardParams& b, const Call<T>& call, const float* delta, const Parallel& parallel) {
  const BlockAttentionParams& p = b.forward;
  using Op = Operand<T>;
  const int64_t d = call.d, group = call.group, stride = call.rows;
  parallel.items(p.num_key_blocks * p.kv_heads, [&](ItemQueue& queue) {
    const TileScope tiles;
    std::vector<Op> k(kKeys * d), v(kKeys * d), q(stride * d), grad_out(stride * d), probabilities(kKeys * stride),
        score_grads(kKeys * stride);
    std::vector<float> scores(kKeys * stride), grad_p(kKeys * stride), grad_k(kKeys * d), grad_v(kKeys * d), lse(stride),
        deltas(stride, 0.f);
    std::vector<uint32_t> by_dim(packed_size<Op>(stride, d)), by_row(packed_size<Op>(d, stride));
    for (int64_t item; queue.next(item);) {
      const int64_t block = p.key_order[item / p.kv_heads], head = item % p.kv_heads, key = block * kKeys;
      const int64_t num_keys = std::min(kKeys, p.num_keys - key);
      gather(static_cast<const T*>(p.k) + call.key(key, head), call.k_stride, num_keys, d, k.data());
      gather(static_cast<const T*>(p.v) + call.key(key, head), call.k_stride, num_keys, d, v.data());
      std::fill(grad_k.begin(), grad_k.end(), 0.f);
      std::fill(grad_v.begin(), grad_v.end(), 0.f);
      const auto step = [&](const Tile& tile, int which) {
        const int64_t begin = std::max<int64_t>(tile.hulls[2 * which], key);
        const int64_t end = std::min<int64_t>(tile.hulls[2 * which + 1], key + num_keys);
        if (end <= begin) return;
        const int64_t rows = tile.tokens * group, padded = round_up(rows, kPanel), n = end - begin, at = (begin - key) * d;
        gather(call.queries(p.q, tile, head), call.q_stride, tile.tokens, call.piece, q.data());
        gather(call.queries(b.grad_out, tile, head), call.q_stride, tile.tokens, call.piece, grad_out.data());
        call.gather_lse(tile, head, lse.data());
        gather_scalars(delta + call.scalar(tile, head), p.heads, tile.tokens, group, deltas.data());
        pack(by_dim.data(), q.data(), d, 1, rows, d);
        gemm_packed(k.data() + at, d, n, by_dim.data(), padded, d, scores.data(), stride);
        pack(by_dim.data(), grad_out.data(), d, 1, rows, d);
        gemm_packed(v.data() + at, d, n, by_dim.data(), padded, d, grad_p.data(), stride);
        for (int64_t j = 0; j < n; ++j)
          for (int64_t i = j * stride; i < j * stride + padded; i += kLanes) {
            const Vec e = exp_of_negative(load(scores.data() + i) * p.scale - load(lse.data() + i - j * stride));
            store_operand(probabilities.data() + i, e);
            store_operand(score_grads.data() + i, e * (load(grad_p.data() + i) - load(deltas.data() + i - j * stride)));
          }
        if (!tile.uniform) {
          const Columns c(key, begin, end);
          const int32_t* intervals = (which ? p.own : p.context) + 2 * tile.begin;
          const auto span = [&](int64_t t) { return span_of(intervals + 2 * t, c); };
          hide_columns(probabilities.data(), score_grads.data(), stride, tile.tokens, group, c, span);
        }
        pack(by_row.data(), grad_out.data(), 1, d, d, rows);
        gemm_packed(probabilities.data(), stride, n, by_row.data(), d, rows, grad_v.data() + at, d, true);
        pack(by_row.data(), q.data(), 1, d, d, rows);
        gemm_packed(score_grads.data(), stride, n, by_row.data(), d, rows, grad_k.data() + at, d, true);
      };
      for (int64_t run = p.key_offsets[block]; run < p.key_offsets[block + 1]; ++run) {
        const int32_t* r = p.key_runs + 3 * run;
        for (int64_t t = r[0]; t < r[1]; ++t) step(Tile(p, t), r[2]);
      }
      scatter(grad_k.data(), num_keys, d, p.scale, static_cast<T*>(b.grad_k) + call.key(key, head), call.k_stride);
      scatter(grad_v.data(), num_keys, d, 1.f, static_cast<T*>(b.grad_v) + call.key(key, head), call.k_stride);
    }
  });
}

template <class T>
void backward(const BlockAttentionBackwardParams& b, const Parallel& parallel) {
  const Call<T> call(b.forward);
  std::vector<float> delta(b.forward.num_queries * b.forward.heads);
  row_products(b, call, delta.data(), parallel);
  backward_queries(b, call, delta.data(), parallel);
  backward_keys(b, call, delta.data(), parallel);
}

}  // namespace

void block_attention(const BlockAttentionParams& p, const Parallel& parallel) {
  p.bf16 ? forward<bf16>(p, parallel) : forward<float>(p, parallel);
}

void block_attention_backward(const BlockAttentionBackwardParams& p, const Parallel& parallel) {
  p.forward.bf16 ? backward<bf16>(p, parallel) : backward<float>(p, parallel);
}

}  // namespace llada::LLADA_CPU_LEVEL
