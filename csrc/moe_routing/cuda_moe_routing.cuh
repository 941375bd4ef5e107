// A warp per token chooses its experts; then a stable counting sort of the choices. Up to kFewTokens tokens one block does all of it in one
// launch; more take three: a block per chunk of tokens (choices and a histogram), one block for the sums over the chunks, a block per
// chunk that writes its slots. Every slot's place is computed, none comes from the order in which threads arrive.
#pragma once

#include "common/cuda.h"
#include "moe_routing/params.h"

namespace llada::cuda {

constexpr int kRoutingWarps = 8, kSmallWarps = 32, kScanThreads = 1024;
constexpr int64_t kFewTokens = 128, kMaxChunks = 256;

#define LLADA_MINUS_INFINITY __uint_as_float(0xff800000u)

// Orders as floats do, with -0 == +0 and NaN above everything (as PyTorch sorts).
__device__ __forceinline__ uint32_t ordered(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(x + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Value and index in one key: among equal values the lowest index is the largest key.
__device__ __forceinline__ uint64_t make_key(float x, int index) { return uint64_t(ordered(x)) << 32 | uint32_t(~uint32_t(index)); }
__device__ __forceinline__ int key_index(uint64_t key) { return int(~uint32_t(key)); }

__device__ __forceinline__ uint64_t warp_largest(uint64_t key) {
  return warp_reduce(key, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}

// The largest key below `limit` of values[0 .. n-1]: called again with its result it goes through them in falling order.
__device__ __forceinline__ uint64_t next_largest(const float* values, int n, uint64_t limit, int lane) {
  uint64_t best = 0;
  for (int i = lane; i < n; i += kWarp) {
    const uint64_t key = make_key(values[i], i);
    if (key < limit && key > best) best = key;
  }
  return warp_largest(best);
}

// Of a row of logits: what turns them into scores.
struct Scores {
  bool softmax;
  float shift, sum;

  __device__ __forceinline__ float operator()(float x) const { return softmax ? expf(x - shift) / sum : 1.f / (1.f + expf(-x)); }
};

__device__ __forceinline__ Scores scores_of(const float* logits, int n, bool softmax, int lane) {
  if (!softmax) return {false, 0.f, 1.f};
  uint64_t best = 0;
  for (int i = lane; i < n; i += kWarp) {
    const uint64_t key = make_key(logits[i], i);
    best = key > best ? key : best;
  }
  const float shift = logits[key_index(warp_largest(best))];
  float sum = 0.f;
  for (int i = lane; i < n; i += kWarp) sum += expf(logits[i] - shift);
  return {true, shift, warp_sum(sum)};
}

// Shared memory of a warp: `biased` of the experts, and the score of each group.
__device__ __forceinline__ void limit_groups(const MoeRoutingParams& p, float* biased, float* groups, int lane) {
  const int count = int(p.n_group), size = int(p.experts) / count;
  for (int g = lane; g < count; g += kWarp) {
    uint64_t first = 0, second = 0;
    for (int j = 0; j < size; ++j) {
      const int i = (j + g) % size;  // lanes start at different banks
      const uint64_t key = make_key(biased[g * size + i], i);
      if (key > first)
        second = first, first = key;
      else if (key > second)
        second = key;
    }
    groups[g] = biased[g * size + key_index(first)] + biased[g * size + key_index(second)];
  }
  __syncwarp();
  uint64_t limit = ~uint64_t(0);
  for (int k = 0; k < p.topk_group; ++k) limit = next_largest(groups, count, limit, lane);
  for (int i = lane; i < p.experts; i += kWarp)  // those behind the last chosen one
    if (make_key(groups[i / size], i / size) < limit) biased[i] = LLADA_MINUS_INFINITY;
  __syncwarp();
}

// A warp chooses the experts of a token. row: shared memory of experts + n_group floats.
__device__ __forceinline__ void choose_experts(const MoeRoutingParams& p, const unsigned char* allowed, int64_t token, float* row,
                                               int lane) {
  const int experts = int(p.experts);
  const float* logits = p.logits + token * p.experts;
  const Scores score = scores_of(logits, experts, p.softmax, lane);
  if (allowed != nullptr) allowed += unsigned(token) / unsigned(p.block_size) * p.experts;  // 32 bits: there are at most 2^31 - 1 choices
#pragma unroll 1  // unrolled, the divisions of a score spill registers
  for (int i = lane; i < experts; i += kWarp) {
    const float s = score(logits[i]);
    row[i] = p.expert_bias != nullptr ? s + p.expert_bias[i] : s;
    if (allowed != nullptr && !allowed[i]) row[i] = LLADA_MINUS_INFINITY;
  }
  __syncwarp();
  if (p.topk_group < p.n_group) limit_groups(p, row, row + experts, lane);
  int32_t* ids = p.topk_ids + token * p.top_k;
  float* weights = p.topk_weights + token * p.top_k;
  uint64_t limit = ~uint64_t(0);
  float sum = 0.f;
#pragma unroll 1
  for (int k = 0; k < p.top_k; ++k) {
    limit = next_largest(row, experts, limit, lane);
    const float s = score(logits[key_index(limit)]);
    sum += s;
    if (lane == 0) ids[k] = key_index(limit), weights[k] = s;
  }
  __syncwarp();
  const float divisor = p.normalize && p.top_k > 1 ? sum + 1e-20f : 1.f;
#pragma unroll 1
  for (int k = lane; k < p.top_k; k += kWarp) weights[k] = weights[k] / divisor * p.scale;
}

// Adds the experts of the slots begin .. end - 1 of a warp to its own histogram.
__device__ __forceinline__ void count_slots(const int32_t* ids, int64_t begin, int64_t end, int* counts, int lane) {
  for (int64_t s = begin + lane; s < end; s += kWarp) atomicAdd(&counts[ids[s]], 1);
}

// Writes these slots to their places; next[e] is where the next slot of expert e goes, and moves on.
__device__ __forceinline__ void place_slots(const int32_t* ids, int64_t begin, int64_t end, int* next, int32_t* permutation, int lane) {
  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t s = first + lane;
    const int expert = s < end ? ids[s] : -1;
    const unsigned same = __match_any_sync(kAllLanes, expert);
    const int rank = __popc(same & ((1u << lane) - 1)), place = expert < 0 ? 0 : next[expert] + rank;
    __syncwarp();
    if (expert >= 0) {
      permutation[place] = int32_t(s);
      if (rank == 0) next[expert] += __popc(same);
    }
    __syncwarp();
  }
}

// The slots of this warp: equal shares of whole warps of the block's.
__device__ __forceinline__ void share_of_warp(int64_t begin, int64_t end, int warps, int64_t& first, int64_t& last) {
  const int64_t share = int64_t(unsigned(end - begin + warps * kWarp - 1) / unsigned(warps * kWarp)) * kWarp;
  const int64_t at = begin + share * (threadIdx.x / kWarp);
  first = at < end ? at : end;
  last = at + share < end ? at + share : end;
}

// Exclusive sums of counts[0 .. n-1] in place by the whole block; `total` gets the sum of all. partial: 32 ints of shared memory.
__device__ __forceinline__ void exclusive_scan(int* counts, int n, int* partial, int& total) {
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int before = 0;
  for (int begin = 0; begin < n; begin += int(blockDim.x)) {
    const int i = begin + int(threadIdx.x), own = i < n ? counts[i] : 0;
    int sum = own;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (lane == kWarp - 1) partial[warp] = sum;
    __syncthreads();
    int all = 0;
    for (int w = 0; w < warps; ++w) {
      if (w < warp) sum += partial[w];
      all += partial[w];
    }
    if (i < n) counts[i] = before + sum - own;
    before += all;
    __syncthreads();
  }
  total = before;
}

// Block pool: biased scores of all tokens, then of each block the experts with the largest maxima.
struct RoutingScratch {
  int* counts;             // [chunks, experts]
  float* biased;           // [tokens, experts], with a block pool
  unsigned char* allowed;  // [blocks, experts], with a block pool, else null
  int64_t chunks, chunk;   // tokens per chunk
};

template <class T>
__global__ void __launch_bounds__(kRoutingWarps* kWarp) bias_scores(MoeRoutingParams p, RoutingScratch scratch) {
  const int64_t token = int64_t(blockIdx.x) * kRoutingWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (token >= p.tokens) return;
  const T* logits = p.logits + token * p.experts;
  const Scores score = scores_of(logits, int(p.experts), p.softmax, lane);
  for (int64_t i = lane; i < p.experts; i += kWarp) {
    const float s = score(logits[i]);
    scratch.biased[token * p.experts + i] = p.expert_bias != nullptr ? s + p.expert_bias[i] : s;
  }
}

template <class T>
__global__ void __launch_bounds__(kScanThreads) pool_experts(MoeRoutingParams p, RoutingScratch scratch) {
  T* maxima = dynamic_shared<T>();
  const T* biased = scratch.biased + int64_t(blockIdx.x) * p.block_size * p.experts;
  for (int64_t e = threadIdx.x; e < p.experts; e += blockDim.x) {
    T best = biased[e];
    for (int64_t t = 1; t < p.block_size; ++t)
      if (const T other = biased[t * p.experts + e]; ordered(other) > ordered(best)) best = other;
    maxima[e] = best;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
    const uint64_t own = make_key(maxima[e], e);
    int64_t rank = 0;
    for (int other = 0; other < p.experts; ++other) rank += make_key(maxima[other], other) > own;
    scratch.allowed[int64_t(blockIdx.x) * p.experts + e] = rank < p.capacity;
  }
}

// Everything by one block. Dynamic shared memory: a row of experts + n_group floats per warp, then as much for the histograms.
template <class T>
__global__ void __launch_bounds__(kSmallWarps* kWarp) route_few(MoeRoutingParams p, RoutingScratch scratch) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, experts = int(p.experts), stride = experts + int(p.n_group);
  for (int64_t token = warp; token < p.tokens; token += kSmallWarps)
    choose_experts(p, scratch.allowed, token, dynamic_shared<T>() + warp * stride, lane);
  __syncthreads();
  int* counts = dynamic_shared<int>();
  struct Sums {
    int partial[kWarp];
  };
  Sums& sums = shared<Sums>();
  const int64_t slots = p.tokens * p.top_k;
  int64_t first, last;
  share_of_warp(0, slots, kSmallWarps, first, last);
  for (int i = threadIdx.x; i < kSmallWarps * experts; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  count_slots(p.topk_ids, first, last, counts + warp * experts, lane);
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    int sum = 0;
    for (int w = 0; w < kSmallWarps; ++w) {
      const int own = counts[w * experts + e];
      counts[w * experts + e] = sum, sum += own;
    }
    p.offsets[e] = sum;
  }
  __syncthreads();
  int total = 0;
  exclusive_scan(p.offsets, experts, sums.partial, total);
  if (threadIdx.x == 0) p.offsets[experts] = total;
  for (int i = threadIdx.x; i < kSmallWarps * experts; i += blockDim.x) counts[i] += p.offsets[i % experts];
  __syncthreads();
  place_slots(p.topk_ids, first, last, counts + warp * experts, p.permutation, lane);
}

template <class T>
__global__ void __launch_bounds__(kRoutingWarps* kWarp) choose_and_count(MoeRoutingParams p, RoutingScratch scratch) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, experts = int(p.experts), stride = experts + int(p.n_group);
  const int64_t begin = blockIdx.x * scratch.chunk, end = begin + scratch.chunk < p.tokens ? begin + scratch.chunk : p.tokens;
  for (int64_t token = begin + warp; token < end; token += kRoutingWarps)
    choose_experts(p, scratch.allowed, token, dynamic_shared<T>() + warp * stride, lane);
  __syncthreads();
  int* counts = dynamic_shared<int>();
  for (int e = threadIdx.x; e < experts; e += blockDim.x) counts[e] = 0;
  __syncthreads();
  int64_t first, last;
  share_of_warp(begin * p.top_k, end * p.top_k, kRoutingWarps, first, last);
  count_slots(p.topk_ids, first, last, counts, lane);
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += blockDim.x) scratch.counts[int64_t(blockIdx.x) * experts + e] = counts[e];
}

// Turns the chunks' counts into the places of their first slots, within each expert; and the offsets.
template <class T>
__global__ void __launch_bounds__(kScanThreads) sum_chunks(MoeRoutingParams p, RoutingScratch scratch) {
  struct Sums {
    int partial[kWarp];
  };
  Sums& sums = shared<Sums>();
  for (int64_t e = threadIdx.x; e < p.experts; e += blockDim.x) {
    int sum = 0;
    for (int64_t c = 0; c < scratch.chunks; ++c) {
      const int own = scratch.counts[c * p.experts + e];
      scratch.counts[c * p.experts + e] = sum, sum += own;
    }
    p.offsets[e] = sum;
  }
  __syncthreads();
  int total = 0;
  exclusive_scan(p.offsets, int(p.experts), sums.partial, total);
  if (threadIdx.x == 0) p.offsets[p.experts] = total;
}

template <class T>
__global__ void __launch_bounds__(kRoutingWarps* kWarp) place_chunks(MoeRoutingParams p, RoutingScratch scratch) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, experts = int(p.experts);
  const int64_t begin = blockIdx.x * scratch.chunk * p.top_k, slots = p.tokens * p.top_k;
  const int64_t end = begin + scratch.chunk * p.top_k < slots ? begin + scratch.chunk * p.top_k : slots;
  int* next = dynamic_shared<int>();
  for (int i = threadIdx.x; i < kRoutingWarps * experts; i += blockDim.x) next[i] = 0;
  __syncthreads();
  int64_t first, last;
  share_of_warp(begin, end, kRoutingWarps, first, last);
  count_slots(p.topk_ids, first, last, next + warp * experts, lane);
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    int sum = p.offsets[e] + scratch.counts[int64_t(blockIdx.x) * experts + e];
    for (int w = 0; w < kRoutingWarps; ++w) {
      const int own = next[w * experts + e];
      next[w * experts + e] = sum, sum += own;
    }
  }
  __syncthreads();
  place_slots(p.topk_ids, first, last, next + warp * experts, p.permutation, lane);
}

inline int launch_moe_routing(const MoeRoutingParams& p, void* workspace, void* stream) {
  RoutingScratch scratch{};
  scratch.chunk = divide_up(p.tokens, kMaxChunks) < 32 ? 32 : divide_up(p.tokens, kMaxChunks);
  scratch.chunks = divide_up(p.tokens, scratch.chunk);
  scratch.counts = static_cast<int*>(workspace);
  const int64_t warps_rows = p.experts + p.n_group;
  if (p.block_size > 0 && p.tokens > 0) {
    scratch.biased = reinterpret_cast<float*>(scratch.counts + kMaxChunks * p.experts);
    scratch.allowed = reinterpret_cast<unsigned char*>(scratch.biased + p.tokens * p.experts);
    int error = launch(bias_scores<float>, divide_up(p.tokens, kRoutingWarps), kRoutingWarps * kWarp, 0, stream, p, scratch);
    if (error != 0) return error;
    error = launch(pool_experts<float>, p.tokens / p.block_size, kScanThreads, size_t(p.experts) * 4, stream, p, scratch);
    if (error != 0) return error;
  }
  const int64_t small_bytes = kSmallWarps * warps_rows * 4, bytes = kRoutingWarps * warps_rows * 4;
  if (p.tokens <= kFewTokens && small_bytes <= kRoutingSharedBytes)
    return launch(route_few<float>, 1, kSmallWarps * kWarp, size_t(small_bytes), stream, p, scratch);
  int error = launch(choose_and_count<float>, scratch.chunks, kRoutingWarps * kWarp, size_t(bytes), stream, p, scratch);
  if (error == 0) error = launch(sum_chunks<float>, 1, kScanThreads, 0, stream, p, scratch);
  if (error == 0) error = launch(place_chunks<float>, scratch.chunks, kRoutingWarps * kWarp, size_t(bytes), stream, p, scratch);
  return error;
}

// A warp per token. With s the chosen scores, S = sum + 1e-20 and g = scale * grad: ds = (g - (g . s) / S) / S, or g without normalisation.
template <class T>
__global__ void __launch_bounds__(kRoutingWarps* kWarp) route_backward(MoeRoutingBackwardParams p) {
  const int64_t token = int64_t(blockIdx.x) * kRoutingWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp, experts = int(p.experts);
  if (token >= p.tokens) return;
  const T *logits = p.logits + token * p.experts, *grad_weights = p.grad_weights + token * p.top_k;
  const int32_t* ids = p.topk_ids + token * p.top_k;
  T* out = p.grad_logits + token * p.experts;
  const Scores score = scores_of(logits, experts, p.softmax, lane);
  const auto chosen = [&](int k) { return unsigned(ids[k]) < unsigned(experts) ? score(logits[ids[k]]) : 0.f; };
  const bool normalize = p.normalize && p.top_k > 1;
  float sum = 0.f, dot = 0.f, mean = 0.f;
  for (int k = 0; k < p.top_k; ++k) sum += chosen(k), dot += grad_weights[k] * p.scale * chosen(k);
  const auto grad = [&](int k) {
    const float g = grad_weights[k] * p.scale;
    return normalize ? (g - dot / (sum + 1e-20f)) / (sum + 1e-20f) : g;
  };
  if (p.softmax)
    for (int k = 0; k < p.top_k; ++k) mean += grad(k) * chosen(k);
  for (int e = lane; e < experts; e += kWarp) {
    float g = 0.f;
    bool found = false;
    for (int k = 0; k < p.top_k; ++k)
      if (ids[k] == e) g = grad(k), found = true;
    const float s = found || p.softmax ? score(logits[e]) : 0.f;
    out[e] = p.softmax ? s * (g - mean) : found ? g * s * (1.f - s) : 0.f;
  }
}

inline int launch_moe_routing_backward(const MoeRoutingBackwardParams& p, void* stream) {
  return launch(route_backward<float>, divide_up(p.tokens, kRoutingWarps), kRoutingWarps * kWarp, 0, stream, p);
}

}  // namespace llada::cuda
