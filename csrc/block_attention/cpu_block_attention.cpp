#include <algorithm>
#include <memory>
#include <vector>

#include "block_attention/params.h"

#include "block_attention/cpu_tile.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

static_assert(kKeys == kAttentionKeyBlock);

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

// What the kernels of one call share: strides, and K (and V) transposed per block of kKeys keys, [kv_heads][blocks][d][kKeys].
template <class T>
struct Call {
  const BlockAttentionParams& p;
  const int64_t d, group, rows, q_stride, k_stride, blocks;
  std::unique_ptr<T[]> k_transposed, v_transposed;

  Call(const BlockAttentionParams& params, bool with_v, const Parallel& parallel)
      : p(params), d(p.head_dim), group(p.heads / p.kv_heads), rows(p.max_tile_queries * group), q_stride(p.heads * d),
        k_stride(p.kv_heads * d), blocks((p.num_keys + kKeys - 1) / kKeys) {
    const int64_t size = p.kv_heads * blocks * d * kKeys;
    k_transposed.reset(new T[size]);
    if (with_v) v_transposed.reset(new T[size]);
    parallel.ranges(p.kv_heads * blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / blocks, key = i % blocks * kKeys, n = std::min(kKeys, p.num_keys - key);
        for (bool v : {false, true}) {
          if (v && !with_v) break;
          T* out = (v ? v_transposed : k_transposed).get() + i * d * kKeys;
          transpose_keys(static_cast<const T*>(v ? p.v : p.k) + key * k_stride + head * d, k_stride, n, d, out);
          clear_keys(n, d, out);
        }
      }
    });
  }

  const T* queries(const void* x, const Tile& tile, int64_t head) const {
    return static_cast<const T*>(x) + tile.begin * q_stride + head * group * d;
  }
  const T* keys(const void* x, int64_t key, int64_t head) const { return static_cast<const T*>(x) + key * k_stride + head * d; }
  const T* block(const std::unique_ptr<T[]>& x, int64_t head, int64_t index) const { return x.get() + (head * blocks + index) * d * kKeys; }
  // Where the scalars of the tile's first row lie in a [num_queries, heads] array.
  int64_t scalar(const Tile& tile, int64_t head) const { return tile.begin * p.heads + head * group; }

  // f(columns, block index, spans) for the part of a tile's context (which = 0) or own (1) hull in each block of keys.
  template <class F>
  void visit(const Tile& tile, int which, int64_t block_begin, int64_t block_end, F&& f) const {
    const int64_t begin = tile.hulls[2 * which], end = tile.hulls[2 * which + 1];
    if (end <= begin) return;
    const int32_t* intervals = (which ? p.own : p.context) + 2 * tile.begin;
    block_end = std::min(block_end, (end + kKeys - 1) / kKeys);
    for (int64_t b = std::max(block_begin, begin / kKeys); b < block_end; ++b) {
      const Columns columns(b * kKeys, std::max(begin, b * kKeys), std::min(end, (b + 1) * kKeys));
      const auto span = [&columns, intervals, uniform = tile.uniform](int64_t t) {
        return uniform ? Span{columns.first, columns.last} : span_of(intervals + 2 * t, columns);
      };
      f(columns, b, span);
    }
  }
};

template <class T>
void forward(const BlockAttentionParams& p, const Parallel& parallel) {
  const Call<T> call(p, false, parallel);
  const int64_t d = call.d, group = call.group;
  parallel.items(p.num_tiles * p.kv_heads, [&](ItemQueue& queue) {
    std::vector<float> q(call.rows * d), out(call.rows * d), scores(call.rows * kKeys), row_max(call.rows), row_sum(call.rows);
    for (int64_t item; queue.next(item);) {
      const Tile tile(p, p.order[item / p.kv_heads]);
      const int64_t head = item % p.kv_heads, rows = tile.tokens * group;
      gather_rows(call.queries(p.q, tile, head), call.q_stride, tile.tokens, group * d, p.scale, q.data());
      std::fill_n(out.begin(), rows * d, 0.f);
      std::fill_n(row_max.begin(), rows, -std::numeric_limits<float>::infinity());
      std::fill_n(row_sum.begin(), rows, 0.f);
      for (int which = 0; which < 2; ++which)
        call.visit(tile, which, 0, call.blocks, [&](const Columns& c, int64_t b, auto span) {
          const T* k = call.block(call.k_transposed, head, b) + c.offset(b * kKeys);
          gemm_nn(q.data(), d, 1, k, kKeys, rows, c.width, d, scores.data(), kKeys);
          softmax_step(scores.data(), tile.tokens, group, c.width, span, row_max.data(), row_sum.data(), out.data(), d);
          gemm_nn(scores.data() + c.first, kKeys, 1, call.keys(p.v, c.begin, head), call.k_stride, rows, d, c.end - c.begin, out.data(), d,
                  true);
        });
      softmax_finish(rows, d, row_max.data(), row_sum.data(), out.data());
      scatter_rows(out.data(), tile.tokens, group * d, 1.f, const_cast<T*>(call.queries(p.out, tile, head)), call.q_stride);
      float* lse = p.lse + call.scalar(tile, head);
      for (int64_t r = 0; r < rows; ++r) lse[r / group * p.heads + r % group] = row_sum[r];
    }
  });
}

// Buffers of one worker of the backward.
struct BackwardScratch {
  std::vector<float> q, grad_out, p, grad_p, lse, delta;
  BackwardScratch(int64_t rows, int64_t d) : q(rows * d), grad_out(rows * d), p(rows * kKeys), grad_p(rows * kKeys), lse(rows), delta(rows) {}
};

// The rows of a tile; delta is filled by the caller. A row that saw no key gets lse = +inf, so that its probabilities are 0.
template <class T>
void gather_tile(const Call<T>& call, const void* grad_out, const Tile& tile, int64_t head, BackwardScratch& s) {
  const int64_t piece = call.group * call.d;
  gather_rows(call.queries(call.p.q, tile, head), call.q_stride, tile.tokens, piece, call.p.scale, s.q.data());
  gather_rows(call.queries(grad_out, tile, head), call.q_stride, tile.tokens, piece, 1.f, s.grad_out.data());
  gather_scalars(call.p.lse + call.scalar(tile, head), call.p.heads, tile.tokens, call.group, s.lse.data());
  for (int64_t r = 0; r < tile.tokens * call.group; ++r)
    if (s.lse[r] == -std::numeric_limits<float>::infinity()) s.lse[r] = std::numeric_limits<float>::infinity();
}

// s.p = probabilities, s.grad_p = gradient of the scores, of one tile on one block of keys.
template <class T, class SpanOf>
void tile_gradients(const Call<T>& call, const Tile& tile, int64_t head, const Columns& c, int64_t b, SpanOf span, BackwardScratch& s) {
  const int64_t rows = tile.tokens * call.group, offset = c.offset(b * kKeys);
  gemm_nn(s.q.data(), call.d, 1, call.block(call.k_transposed, head, b) + offset, kKeys, rows, c.width, call.d, s.p.data(), kKeys);
  probabilities(s.p.data(), tile.tokens, call.group, c.width, span, s.lse.data());
  gemm_nn(s.grad_out.data(), call.d, 1, call.block(call.v_transposed, head, b) + offset, kKeys, rows, c.width, call.d, s.grad_p.data(), kKeys);
  score_gradients(s.p.data(), s.grad_p.data(), rows, c.width, s.delta.data());
}

// Query-stationary: grad_q = scale * sum over keys of dS k. Also leaves delta = sum(grad_out * out) per query and head.
template <class T>
void backward_queries(const BlockAttentionBackwardParams& b, const Call<T>& call, float* delta, const Parallel& parallel) {
  const BlockAttentionParams& p = b.forward;
  const int64_t d = call.d, group = call.group;
  parallel.items(p.num_tiles * p.kv_heads, [&](ItemQueue& queue) {
    BackwardScratch s(call.rows, d);
    std::vector<float> grad_q(call.rows * d);
    for (int64_t item; queue.next(item);) {
      const Tile tile(p, p.order[item / p.kv_heads]);
      const int64_t head = item % p.kv_heads, rows = tile.tokens * group;
      gather_tile(call, b.grad_out, tile, head, s);
      gather_rows(call.queries(p.out, tile, head), call.q_stride, tile.tokens, group * d, 1.f, grad_q.data());
      for (int64_t r = 0; r < rows; ++r) {
        float sum = 0.f;
        gemm_nt(grad_q.data() + r * d, d, s.grad_out.data() + r * d, d, 1, 1, d, &sum, 1);
        s.delta[r] = delta[call.scalar(tile, head) + r / group * p.heads + r % group] = sum;
      }
      std::fill_n(grad_q.begin(), rows * d, 0.f);
      for (int which = 0; which < 2; ++which)
        call.visit(tile, which, 0, call.blocks, [&](const Columns& c, int64_t block, auto span) {
          tile_gradients(call, tile, head, c, block, span, s);
          gemm_nn(s.grad_p.data() + c.first, kKeys, 1, call.keys(p.k, c.begin, head), call.k_stride, rows, d, c.end - c.begin,
                  grad_q.data(), d, true);
        });
      scatter_rows(grad_q.data(), tile.tokens, group * d, p.scale, const_cast<T*>(call.queries(b.grad_q, tile, head)), call.q_stride);
    }
  });
}

// Key-stationary: grad_v = P^T grad_out, grad_k = dS^T (scale * q), over the query tiles that the plan lists for a block of keys.
template <class T>
void backward_keys(const BlockAttentionBackwardParams& b, const Call<T>& call, const float* delta, const Parallel& parallel) {
  const BlockAttentionParams& p = b.forward;
  const int64_t d = call.d, group = call.group;
  parallel.items(p.num_key_blocks * p.kv_heads, [&](ItemQueue& queue) {
    BackwardScratch s(call.rows, d);
    std::vector<float> grad_k(kKeys * d), grad_v(kKeys * d);
    for (int64_t item; queue.next(item);) {
      const int64_t block = p.key_order[item / p.kv_heads], head = item % p.kv_heads;
      std::fill(grad_k.begin(), grad_k.end(), 0.f);
      std::fill(grad_v.begin(), grad_v.end(), 0.f);
      for (int64_t run = p.key_offsets[block]; run < p.key_offsets[block + 1]; ++run) {
        const int32_t* r = p.key_runs + 3 * run;
        for (int64_t t = r[0]; t < r[1]; ++t) {
          const Tile tile(p, t);
          const int64_t rows = tile.tokens * group;
          gather_tile(call, b.grad_out, tile, head, s);
          gather_scalars(delta + call.scalar(tile, head), p.heads, tile.tokens, group, s.delta.data());
          call.visit(tile, r[2], block, block + 1, [&](const Columns& c, int64_t, auto span) {
            tile_gradients(call, tile, head, c, block, span, s);
            const int64_t n = c.end - c.begin, at = (c.begin - block * kKeys) * d;
            gemm_nn(s.p.data() + c.first, 1, kKeys, s.grad_out.data(), d, n, d, rows, grad_v.data() + at, d, true);
            gemm_nn(s.grad_p.data() + c.first, 1, kKeys, s.q.data(), d, n, d, rows, grad_k.data() + at, d, true);
          });
        }
      }
      const int64_t key = block * kKeys, n = std::min(kKeys, p.num_keys - key);
      scatter_rows(grad_k.data(), n, d, 1.f, const_cast<T*>(call.keys(b.grad_k, key, head)), call.k_stride);
      scatter_rows(grad_v.data(), n, d, 1.f, const_cast<T*>(call.keys(b.grad_v, key, head)), call.k_stride);
    }
  });
}

template <class T>
void backward(const BlockAttentionBackwardParams& b, const Parallel& parallel) {
  const Call<T> call(b.forward, true, parallel);
  std::vector<float> delta(b.forward.num_queries * b.forward.heads);
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
