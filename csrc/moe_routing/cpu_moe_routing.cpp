#include <algorithm>
#include <limits>
#include <vector>

#include "moe_routing/params.h"

#include "common/simd.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Orders as floats do, with -0 == +0 and NaN above everything (as PyTorch sorts).
inline uint32_t ordered(float x) {
  if (x != x) return 0xffffffffu;
  x += 0.f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline float larger(float a, float b) { return ordered(b) > ordered(a) ? b : a; }
// Value and index in one key: among equal values the lowest index is the largest key.
inline uint64_t make_key(float x, int64_t index) { return uint64_t(ordered(x)) << 32 | uint32_t(~uint32_t(index)); }
inline int32_t key_index(uint64_t key) { return int32_t(~uint32_t(key)); }

// The `count` largest of values[0 .. n-1] as keys, descending.
inline void largest(const float* values, int64_t n, int64_t count, uint64_t* keys) {
  int64_t have = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t key = make_key(values[i], i);
    if (have == count) {
      if (key < keys[count - 1]) continue;
      --have;
    }
    int64_t at = have++;
    for (; at > 0 && keys[at - 1] < key; --at) keys[at] = keys[at - 1];
    keys[at] = key;
  }
}

// sigmoid, or softmax over the row.
inline void score_row(const float* logits, int64_t n, bool softmax, float* scores) {
  float shift = 0.f;
  if (softmax) {
    shift = logits[0];
    for (int64_t i = 1; i < n; ++i) shift = larger(shift, logits[i]);
  }
  Vec total{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = std::min<int64_t>(kLanes, n - i);
    const Vec x = left == kLanes ? load(logits + i) : load_partial(logits + i, left, kMinusInfinity);
    const Vec y = softmax ? vexp(x - shift) : 1.f / (1.f + vexp(-x));
    total += y;
    left == kLanes ? store(scores + i, y) : store_partial(scores + i, y, left);
  }
  if (!softmax) return;
  const float sum = reduce_add(total);
  for (int64_t i = 0; i < n; ++i) scores[i] /= sum;
}

// -inf for all experts outside the best groups. A group's score is the sum of its two largest values.
inline void limit_groups(const MoeRoutingParams& p, float* biased, float* group_scores, uint64_t* keys) {
  const int64_t size = p.experts / p.n_group;
  for (int64_t g = 0; g < p.n_group; ++g) {
    uint64_t best[2];
    largest(biased + g * size, size, 2, best);
    group_scores[g] = biased[g * size + key_index(best[0])] + biased[g * size + key_index(best[1])];
  }
  largest(group_scores, p.n_group, p.topk_group, keys);
  std::fill(group_scores, group_scores + p.n_group, 0.f);
  for (int64_t k = 0; k < p.topk_group; ++k) group_scores[key_index(keys[k])] = 1.f;
  for (int64_t g = 0; g < p.n_group; ++g)
    if (group_scores[g] == 0.f) std::fill(biased + g * size, biased + (g + 1) * size, kMinusInfinity);
}

// -inf for all experts but those with the largest maximum over the block's tokens.
inline void limit_block(const MoeRoutingParams& p, float* biased, float* maxima, uint64_t* keys) {
  std::copy(biased, biased + p.experts, maxima);
  for (int64_t t = 1; t < p.block_size; ++t)
    for (int64_t e = 0; e < p.experts; ++e) maxima[e] = larger(maxima[e], biased[t * p.experts + e]);
  largest(maxima, p.experts, p.capacity, keys);
  std::fill(maxima, maxima + p.experts, 0.f);
  for (int64_t k = 0; k < p.capacity; ++k) maxima[key_index(keys[k])] = 1.f;
  for (int64_t t = 0; t < p.block_size; ++t)
    for (int64_t e = 0; e < p.experts; ++e)
      if (maxima[e] == 0.f) biased[t * p.experts + e] = kMinusInfinity;
}

// Tokens [first, first + count) and their scores and biased scores [count, experts].
inline void choose(const MoeRoutingParams& p, int64_t first, int64_t count, float* scores, float* biased, float* temp, uint64_t* keys) {
  for (int64_t t = 0; t < count; ++t) {
    float* row = scores + t * p.experts;
    score_row(p.logits + (first + t) * p.experts, p.experts, p.softmax, row);
    for (int64_t e = 0; e < p.experts; ++e) biased[t * p.experts + e] = p.expert_bias ? row[e] + p.expert_bias[e] : row[e];
    if (p.topk_group < p.n_group) limit_groups(p, biased + t * p.experts, temp, keys);
  }
  if (p.block_size) limit_block(p, biased, temp, keys);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t out = (first + t) * p.top_k;
    largest(biased + t * p.experts, p.experts, p.top_k, keys);
    float sum = 0.f;
    for (int64_t k = 0; k < p.top_k; ++k) {
      const int32_t expert = key_index(keys[k]);
      p.topk_ids[out + k] = expert;
      sum += p.topk_weights[out + k] = scores[t * p.experts + expert];
    }
    const float divisor = p.normalize && p.top_k > 1 ? sum + 1e-20f : 1.f;
    for (int64_t k = 0; k < p.top_k; ++k) p.topk_weights[out + k] = p.topk_weights[out + k] / divisor * p.scale;
  }
}

// Counting sort in slot order: stable. One thread: a few instructions per slot.
inline void sort_by_expert(const MoeRoutingParams& p) {
  const int64_t slots = p.tokens * p.top_k;
  std::fill(p.offsets, p.offsets + p.experts + 1, 0);
  for (int64_t s = 0; s < slots; ++s) ++p.offsets[p.topk_ids[s] + 1];
  for (int64_t e = 0; e < p.experts; ++e) p.offsets[e + 1] += p.offsets[e];
  std::vector<int32_t> next(p.offsets, p.offsets + p.experts);
  for (int64_t s = 0; s < slots; ++s) p.permutation[next[size_t(p.topk_ids[s])]++] = int32_t(s);
}

}  // namespace

void moe_routing(const MoeRoutingParams& p, const Parallel& parallel) {
  const int64_t unit = p.block_size ? p.block_size : 1;  // tokens that must be seen together
  parallel.ranges(p.tokens / unit, 2048 / (unit * p.experts) + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(size_t(unit * p.experts)), biased(size_t(unit * p.experts)), temp(size_t(p.experts));
    std::vector<uint64_t> keys(size_t(p.experts));
    for (int64_t i = begin; i < end; ++i) choose(p, i * unit, unit, scores.data(), biased.data(), temp.data(), keys.data());
  });
  sort_by_expert(p);
}

// With s the chosen scores, S = sum + 1e-20 and g = scale * grad: ds = (g - (g . s) / S) / S, or g without normalisation.
void moe_routing_backward(const MoeRoutingBackwardParams& p, const Parallel& parallel) {
  parallel.ranges(p.tokens, 2048 / p.experts + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(size_t(p.experts)), grad(size_t(p.top_k));
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* ids = p.topk_ids + t * p.top_k;
      float* out = p.grad_logits + t * p.experts;
      score_row(p.logits + t * p.experts, p.experts, p.softmax, scores.data());
      float sum = 0.f, dot = 0.f;
      for (int64_t k = 0; k < p.top_k; ++k) {
        grad[k] = p.grad_weights[t * p.top_k + k] * p.scale;
        sum += scores[ids[k]];
        dot += grad[k] * scores[ids[k]];
      }
      if (p.normalize && p.top_k > 1)
        for (int64_t k = 0; k < p.top_k; ++k) grad[k] = (grad[k] - dot / (sum + 1e-20f)) / (sum + 1e-20f);
      std::fill(out, out + p.experts, 0.f);
      if (p.softmax) {
        float mean = 0.f;
        for (int64_t k = 0; k < p.top_k; ++k) mean += grad[k] * scores[ids[k]];
        for (int64_t k = 0; k < p.top_k; ++k) out[ids[k]] = grad[k];
        for (int64_t e = 0; e < p.experts; ++e) out[e] = scores[e] * (out[e] - mean);
      } else {
        for (int64_t k = 0; k < p.top_k; ++k) out[ids[k]] = grad[k] * scores[ids[k]] * (1.f - scores[ids[k]]);
      }
    }
  });
}

}  // namespace llada::LLADA_CPU_LEVEL
