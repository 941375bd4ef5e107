// Temperature above 0: a block per position draws a token. Weights are integers on the grid of reference.py, so sums are exact and the
// order in which threads add does not matter; a weight that top_k and top_p drop is never computed.
#pragma once

#include "threshold_unmask/cuda_arithmetic.cuh"

namespace llada::cuda {

constexpr int kSampleThreads = 1024, kSampleWarps = kSampleThreads / kWarp;
constexpr int kMaxParts = 1024;  // a vocabulary of 2^20

// A prefix of the ids sorted by logit, largest first, lowest id first among equals: every id above `key`, and the first `ties` at it.
struct Prefix {
  uint32_t key;
  int64_t ties;
};

struct SampleShared {
  int64_t mass_above[kMaxParts];  // of the kept ids of a part that lie above the key; later: below the part
  int ties[kMaxParts];            // ids of a part that lie at the key; later: the kept ones before the part
  unsigned long long bin_mass[256];
  int bin_count[256];
  int64_t warp_mass[kSampleWarps], total, mask_mass, below;
  int warp_ties[kSampleWarps], digit, part, token, ties_before_mask;
  int64_t count_above, sum_above;
};

template <class T>
struct Sampler {
  const T* x;
  int64_t vocab;
  double top, temperature, snap;
  SampleShared& s;

  __device__ __forceinline__ int64_t weight(float value) const {
    double z = double(value) - top;
    if (temperature != 1.0) z = z / temperature;
    // Below half a unit of the grid, 2^-50 for the smallest vocabulary, e^-36 rounds to 0 in any case: most ids of a peaked distribution.
    return z < -36.0 ? 0 : to_units(exponential(z), snap);
  }

  // Adds count and mass of this warp's ids to their bins, one bin after the other. Every lane takes part; bin < 0: nothing.
  __device__ __forceinline__ void add_to_bins(int bin, int64_t mass) const {
    unsigned pending = __ballot_sync(kAllLanes, bin >= 0);
    while (pending != 0) {
      const int leader = __ffs(pending) - 1, chosen = __shfl_sync(kAllLanes, bin, leader);
      const unsigned same = __ballot_sync(kAllLanes, bin == chosen);
      const int64_t sum = warp_sum(bin == chosen ? mass : int64_t(0));
      if (int(threadIdx.x % kWarp) == leader) {
        atomicAdd(&s.bin_count[chosen], __popc(same));
        atomicAdd(&s.bin_mass[chosen], static_cast<unsigned long long>(sum));
      }
      pending &= ~same;
    }
  }

  // The shortest non-empty prefix of at least `count` ids (by_count) or of at least `share` of the mass `whole`, whole < 0: of all ids.
  // A radix select, a byte at a time; the low 16 bits of a bf16 number say nothing new.
  __device__ Prefix shortest_prefix(bool by_count, int64_t count, double share, int64_t whole) const {
    uint32_t fixed = 0, fixed_bits = 0;
    double reach = share * double(whole);
    if (threadIdx.x == 0) s.count_above = 0, s.sum_above = 0;
    for (int shift = 24; shift >= (sizeof(T) == 2 ? 16 : 0); shift -= 8) {
      __syncthreads();
      for (int i = threadIdx.x; i < 256; i += kSampleThreads) s.bin_count[i] = 0, s.bin_mass[i] = 0;
      __syncthreads();
      for (int64_t begin = 0; begin < vocab; begin += kSampleThreads) {
        const int64_t i = begin + threadIdx.x;
        const float value = i < vocab ? to_float(x[i]) : 0.f;
        const uint32_t key = order_key(value);
        const bool in = i < vocab && (key & fixed_bits) == fixed;
        add_to_bins(in ? int((key >> shift) & 255) : -1, in && !by_count ? weight(value) : 0);
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        if (!by_count && whole < 0 && fixed_bits == 0) {
          int64_t all = 0;
          for (int b = 0; b < 256; ++b) all += int64_t(s.bin_mass[b]);
          s.total = all;
        }
        if (whole < 0) reach = share * double(s.total);
        int bin = 255;
        for (; bin > 0; --bin) {
          const int64_t more = s.count_above + s.bin_count[bin], mass = s.sum_above + int64_t(s.bin_mass[bin]);
          if (s.bin_count[bin] > 0 && (by_count ? more >= count : double(mass) >= reach)) break;
          s.count_above = more, s.sum_above = mass;
        }
        s.digit = bin;
      }
      __syncthreads();
      fixed |= uint32_t(s.digit) << shift;
      fixed_bits |= 255u << shift;
    }
    if (whole < 0) reach = share * double(s.total);
    int64_t ties = count - s.count_above;
    if (!by_count) {
      const int most = s.bin_count[s.digit];
      const int64_t one = most > 0 ? int64_t(s.bin_mass[s.digit]) / most : 0;
      ties = 1;
      while (ties < most && double(s.sum_above + ties * one) < reach) ++ties;
    }
    return {sizeof(T) == 2 && (fixed >> 31) == 0 ? fixed | 0xffffu : fixed, ties};  // keys of negative bf16 numbers end in ones
  }

  // Mass of the ids of each part above `key`, and their number at it, into shared memory.
  __device__ void reduce_parts(uint32_t key, int64_t mask_token_id) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int parts = int((vocab + kPart - 1) / kPart);
    __syncthreads();
    if (threadIdx.x == 0) s.ties_before_mask = 0;
    __syncthreads();
    for (int part = warp; part < parts; part += kSampleWarps) {
      int64_t mass = 0;
      int ties = 0, before = 0;
      for (int j = lane; j < kPart; j += kWarp) {
        const int64_t i = int64_t(part) * kPart + j;
        if (i >= vocab) break;
        const float value = to_float(x[i]);
        const uint32_t own = order_key(value);
        if (own > key) mass += weight(value);
        ties += own == key;
        before += own == key && i < mask_token_id;
      }
      mass = warp_sum(mass), ties = warp_sum(ties), before = warp_sum(before);
      if (lane == 0) {
        s.mass_above[part] = mass, s.ties[part] = ties;
        if (before > 0) atomicAdd(&s.ties_before_mask, before);
      }
    }
    __syncthreads();
  }

  // The float with this key.
  __device__ static float value_of(uint32_t key) {
    const float value = __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
    return value;
  }

  // Mass of what a prefix keeps.
  __device__ int64_t prefix_mass(const Prefix& prefix) const {
    reduce_parts(prefix.key, -1);
    if (threadIdx.x == 0) {
      int64_t mass = prefix.ties * weight(value_of(prefix.key));
      for (int part = 0; part < int((vocab + kPart - 1) / kPart); ++part) mass += s.mass_above[part];
      s.total = mass;
    }
    __syncthreads();
    const int64_t mass = s.total;
    __syncthreads();
    return mass;
  }
};

template <class T>
__global__ void __launch_bounds__(kSampleThreads) sample_tokens(ThresholdUnmaskParams p, UnmaskScratch scratch) {
  const int64_t position = blockIdx.x, row = position / p.length;
  const double temperature = p.temperature[row];
  if (!(temperature > 0) || p.bad[position]) return;  // the whole block; such a position keeps the most probable token
  SampleShared& s = shared<SampleShared>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Sampler<T> sampler{static_cast<const T*>(p.logits) + position * p.vocab,
                           p.vocab,
                           double(scratch.tops[position]),
                           temperature,
                           grid_constant(p.vocab),
                           s};
  const int64_t k = p.top_k == nullptr || p.top_k[row] == 0 || p.top_k[row] > p.vocab ? p.vocab : p.top_k[row];
  const double top_p = p.top_p == nullptr ? 1.0 : p.top_p[row];
  Prefix prefix{0, 0};
  if (k < p.vocab) prefix = sampler.shortest_prefix(true, k, 0, 0);
  if (top_p < 1.0) prefix = sampler.shortest_prefix(false, 0, top_p, k < p.vocab ? sampler.prefix_mass(prefix) : -1);
  sampler.reduce_parts(prefix.key, p.mask_token_id);

  // Where the draw falls: the first id up to which the kept ids without the mask token have more than `target`.
  const int64_t one = prefix.ties > 0 ? sampler.weight(Sampler<T>::value_of(prefix.key)) : 0;
  const float mask_value = to_float(sampler.x[p.mask_token_id]);
  const uint32_t mask_key = order_key(mask_value);
  const bool mask_kept = mask_key > prefix.key || (mask_key == prefix.key && s.ties_before_mask < prefix.ties);
  const int64_t mask_mass = mask_kept ? sampler.weight(mask_value) : 0;
  const int mask_part = int(p.mask_token_id / kPart);
  const int64_t seat = p.positions != nullptr ? p.positions[position] : position % p.length;
  const double uniform = philox_uniform(uint64_t(p.seed[row]), uint64_t(seat), uint64_t(p.forward_index[row]));
  if (threadIdx.x == 0) {
    int64_t total = 0;
    int ties = 0;  // kept in the parts before this one
    for (int part = 0; part < scratch.parts; ++part) {
      const int64_t left = prefix.ties - ties;
      const int kept = int(s.ties[part] < left ? s.ties[part] : left);
      s.ties[part] = ties, ties += kept;
      const int64_t mass = s.mass_above[part] + kept * one;
      total += mass;
      s.mass_above[part] = part == mask_part ? mass - mask_mass : mass;
    }
    s.total = total;
    const double target = uniform * double(total - mask_mass);
    int64_t below = 0;
    int part = 0;
    for (; part + 1 < scratch.parts && double(below + s.mass_above[part]) <= target; ++part) below += s.mass_above[part];
    s.part = part, s.below = below, s.token = kPart;
  }
  __syncthreads();
  const int64_t total = s.total, others = total - mask_mass;
  if (others == 0) {
    if (threadIdx.x == 0) p.confidence[position] = 0.f;
    return;
  }
  const double target = uniform * double(others);
  const int64_t i = int64_t(s.part) * kPart + threadIdx.x;
  const bool inside = i < p.vocab;
  const float value = inside ? to_float(sampler.x[i]) : 0.f;
  const uint32_t key = order_key(value);
  const bool tie = inside && key == prefix.key;
  const unsigned tied = __ballot_sync(kAllLanes, tie);
  if (lane == 0) s.warp_ties[warp] = __popc(tied);
  __syncthreads();
  int rank = s.ties[s.part] + __popc(tied & ((1u << lane) - 1));
  for (int w = 0; w < warp; ++w) rank += s.warp_ties[w];
  int64_t own = 0;
  if (inside && (key > prefix.key || (tie && rank < prefix.ties))) own = sampler.weight(value);
  int64_t sum = i == p.mask_token_id ? 0 : own;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int64_t other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == kWarp - 1) s.warp_mass[warp] = sum;
  __syncthreads();
  sum += s.below;
  for (int w = 0; w < warp; ++w) sum += s.warp_mass[w];
  if (inside && double(sum) > target) atomicMin(&s.token, int(threadIdx.x));
  __syncthreads();
  if (int(threadIdx.x) != s.token) return;
  p.new_tokens[position] = i;
  p.confidence[position] = ratio(double(own), double(total));
}

static_assert(kSampleThreads == kPart, "a thread per id of the part in which the draw falls");
static_assert(sizeof(SampleShared) <= 48 * 1024, "static shared memory");

}  // namespace llada::cuda
