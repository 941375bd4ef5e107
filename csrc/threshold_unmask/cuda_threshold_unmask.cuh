// Three steps: a warp per part of 1024 logits, a warp per position over its parts, a block per row for the rules. The sums are those of
// reference.py in its order, so the results are bitwise those of every other backend. Bad logits (NaN, +inf, nothing finite) do not raise:
// they mark their row with counts of -1, which the caller sees when it reads the results.
#pragma once

#include "threshold_unmask/cuda_sampling.cuh"

namespace llada::cuda {

constexpr int kReduceWarps = 8;    // parts per block
constexpr int kChooseWarps = 8;    // positions per block
constexpr int kRowThreads = 1024;  // of the rules
constexpr int kFewPositions = 64;  // up to here one block per row also chooses the tokens: one launch less

// The logits 2 * lane, 2 * lane + 1 of each 64 of the n logits at x, -inf behind them.
template <class T>
__device__ __forceinline__ void load_part(const T* x, int n, int lane, float (&values)[kPart / kWarp]) {
  constexpr int kSteps = kPart / kWarp / 2;
  if (n == kPart && reinterpret_cast<uintptr_t>(x) % sizeof(Pack<T, 2>) == 0) {
    Pack<T, 2> pairs[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) pairs[i] = load_pack<2>(x + 64 * i + 2 * lane);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) values[2 * i] = to_float(pairs[i].at[0]), values[2 * i + 1] = to_float(pairs[i].at[1]);
  } else {
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      const int index = 64 * (i / 2) + 2 * lane + i % 2;
      values[i] = index < n ? to_float(x[index]) : -LLADA_INFINITY;
    }
  }
}

// A warp reduces one part.
template <class T>
__global__ void __launch_bounds__(kReduceWarps* kWarp) reduce_parts(ThresholdUnmaskParams p, UnmaskScratch scratch) {
  constexpr int kValues = kPart / kWarp;
  const unsigned groups = unsigned(scratch.parts + kReduceWarps - 1) / kReduceWarps;
  const int64_t position = blockIdx.x / groups;
  const int part = int(blockIdx.x % groups) * kReduceWarps + int(threadIdx.x / kWarp), lane = threadIdx.x % kWarp;
  if (part >= scratch.parts) return;
  const int64_t first = int64_t(part) * kPart, left = p.vocab - first;
  float x[kValues];
  load_part(static_cast<const T*>(p.logits) + position * p.vocab + first, int(left < kPart ? left : kPart), lane, x);

  float max = x[0];
#pragma unroll
  for (int i = 1; i < kValues; ++i) max = max_or_nan(max, x[i]);
  max = warp_reduce(max, [](float a, float b) { return max_or_nan(a, b); });
  float best = max;
  const int64_t mask = p.mask_token_id - first;
  if (0 <= mask && mask < kPart) {
    best = -LLADA_INFINITY;
#pragma unroll
    for (int i = 0; i < kValues; ++i)
      if (mask != 64 * (i / 2) + 2 * lane + i % 2) best = fmaxf(best, x[i]);
    best = warp_reduce(best, [](float a, float b) { return fmaxf(a, b); });
  }

  // 64 sums of 16 weights, then halves are added: lane l of a half is (thread l / 2, sum l % 2).
  const float lowest = -3.402823466e38f, shift = max > lowest ? max : lowest;  // finite, if the part has no NaN or +inf
  float sums[2] = {exponential(x[0] - shift), exponential(x[1] - shift)};
#pragma unroll
  for (int i = 2; i < kValues; ++i) sums[i % 2] += exponential(x[i] - shift);
  sums[0] = warp_sum(sums[0]), sums[1] = warp_sum(sums[1]);
  if (lane == 0) scratch.results[position * scratch.parts + part] = {max, sums[0] + sums[1], best};
}

// A warp chooses the most probable token of a position, from its parts.
template <class T>
__device__ __forceinline__ void choose_token(const ThresholdUnmaskParams& p, const UnmaskScratch& scratch, int64_t position, int lane) {
  constexpr int kAtOnce = 5;  // parts whose exponentials a lane computes side by side: 5 * 32 parts are a vocabulary of 163840
  const PartResult* results = scratch.results + position * scratch.parts;
  float top = -LLADA_INFINITY, best = -LLADA_INFINITY;
  int best_part = scratch.parts;
  for (int i = lane; i < scratch.parts; i += kWarp) {
    top = max_or_nan(top, results[i].max);
    if (results[i].best > best) best = results[i].best, best_part = i;
  }
  top = warp_reduce(top, [](float a, float b) { return max_or_nan(a, b); });
  const float warp_best = warp_reduce(best, [](float a, float b) { return fmaxf(a, b); });
  best_part = warp_reduce(best == warp_best ? best_part : scratch.parts, [](int a, int b) { return a < b ? a : b; });
  const bool bad = !(top < LLADA_INFINITY) || best_part == scratch.parts;
  if (bad) {
    if (lane == 0) p.bad[position] = 1, p.confidence[position] = __uint_as_float(0x7fc00000u);
    return;
  }

  const double snap = grid_constant(p.vocab);
  double total = 0;  // of multiples of the grid: exact in any order
  for (int begin = 0; begin < scratch.parts; begin += kAtOnce * kWarp) {
    PartResult part[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = begin + j * kWarp + lane;
      part[j] = {-LLADA_INFINITY, 0.f, 0.f};
      if (i < scratch.parts) part[j] = results[i];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) total += (double(part[j].sum) * exponential(double(part[j].max) - double(top)) + snap) - snap;
  }
  total = warp_sum(total);

  const int64_t first = int64_t(best_part) * kPart, left = p.vocab - first;
  float x[kPart / kWarp];
  load_part(static_cast<const T*>(p.logits) + position * p.vocab + first, int(left < kPart ? left : kPart), lane, x);
  int index = kPart;
#pragma unroll
  for (int i = kPart / kWarp - 1; i >= 0; --i) {
    const int at = 64 * (i / 2) + 2 * lane + i % 2;
    if (x[i] == warp_best && first + at != p.mask_token_id) index = at;
  }
  index = warp_reduce(index, [](int a, int b) { return a < b ? a : b; });
  if (lane == 0) {
    p.bad[position] = 0;
    scratch.tops[position] = top;
    p.new_tokens[position] = first + index;
    p.confidence[position] = ratio(exponential(double(warp_best) - double(top)), total);  // not rounded to the grid, so never 0
  }
}

// Which positions of a row take their token. new_tokens holds the chosen ones and receives the result.
__device__ __forceinline__ void apply_rules(const ThresholdUnmaskParams& p, int64_t row) {
  struct Counts {
    int bad, masked, confident, edited;
  };
  Counts& counts = shared<Counts>();
  const int64_t* tokens = p.tokens + row * p.length;
  const float* confidence = p.confidence + row * p.length;
  int64_t* out = p.new_tokens + row * p.length;
  const float threshold = p.threshold[row], limit = p.editing_threshold == nullptr ? -1.f : p.editing_threshold[row];
  if (threadIdx.x == 0) counts = {0, 0, 0, 0};
  __syncthreads();
  for (int64_t i = threadIdx.x; i < p.length; i += blockDim.x) {
    if (p.bad[row * p.length + i]) atomicAdd(&counts.bad, 1);
    if (tokens[i] != p.mask_token_id) continue;
    atomicAdd(&counts.masked, 1);
    if (confidence[i] > threshold) atomicAdd(&counts.confident, 1);
  }
  __syncthreads();
  const bool enough = counts.confident >= p.min_unmask[row];
  for (int64_t i = threadIdx.x; i < p.length; i += blockDim.x) {
    bool take;
    if (counts.bad > 0) {
      take = false;
    } else if (tokens[i] != p.mask_token_id) {
      take = limit >= 0 && (p.editable == nullptr || p.editable[row * p.length + i]) && out[i] != tokens[i] && confidence[i] > limit;
      if (take) atomicAdd(&counts.edited, 1);
    } else if (enough) {
      take = confidence[i] > threshold;
    } else {  // one of the most confident, the lowest position first among equals
      int64_t rank = 0;
      for (int64_t j = 0; j < p.length; ++j)
        rank += tokens[j] == p.mask_token_id && (confidence[j] > confidence[i] || (confidence[j] == confidence[i] && j < i));
      take = rank < p.min_unmask[row];
    }
    if (!take) out[i] = tokens[i];
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  const int accepted = enough || counts.masked < p.min_unmask[row] ? (enough ? counts.confident : counts.masked) : int(p.min_unmask[row]);
  p.counts[2 * row] = counts.bad > 0 ? -1 : accepted;
  p.counts[2 * row + 1] = counts.bad > 0 ? -1 : counts.edited;
}

template <class T>
__global__ void __launch_bounds__(kChooseWarps* kWarp) choose_tokens(ThresholdUnmaskParams p, UnmaskScratch scratch) {
  const int64_t position = int64_t(blockIdx.x) * kChooseWarps + threadIdx.x / kWarp;
  if (position < p.rows * p.length) choose_token<T>(p, scratch, position, threadIdx.x % kWarp);
}

// Instantiated with T only so that it lies beside the others.
template <class T>
__global__ void __launch_bounds__(kRowThreads) apply_rules_to_rows(ThresholdUnmaskParams p) {
  apply_rules(p, blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) choose_and_apply(ThresholdUnmaskParams p, UnmaskScratch scratch) {
  const int64_t row = blockIdx.x;
  for (int64_t i = threadIdx.x / kWarp; i < p.length; i += kRowThreads / kWarp)
    choose_token<T>(p, scratch, row * p.length + i, threadIdx.x % kWarp);
  __syncthreads();
  apply_rules(p, row);
}

template <class T>
int launch_threshold_unmask(ThresholdUnmaskParams p, void* workspace, void* stream) {
  const int64_t positions = p.rows * p.length, parts = divide_up(p.vocab, kPart);
  UnmaskScratch scratch;
  scratch.parts = int(parts);
  scratch.results = static_cast<PartResult*>(workspace);
  scratch.tops = reinterpret_cast<float*>(scratch.results + positions * parts);
  p.bad = reinterpret_cast<char*>(scratch.tops + positions);
  int error = launch(reduce_parts<T>, positions * divide_up(parts, kReduceWarps), kReduceWarps * kWarp, 0, stream, p, scratch);
  if (error != 0) return error;
  const bool sampling = p.temperature != nullptr;
  if (!sampling && p.length <= kFewPositions) return launch(choose_and_apply<T>, p.rows, kRowThreads, 0, stream, p, scratch);
  error = launch(choose_tokens<T>, divide_up(positions, kChooseWarps), kChooseWarps * kWarp, 0, stream, p, scratch);
  if (error == 0 && sampling) error = launch(sample_tokens<T>, positions, kSampleThreads, 0, stream, p, scratch);
  if (error != 0) return error;
  return launch(apply_rules_to_rows<T>, p.rows, kRowThreads, 0, stream, p);
}

}  // namespace llada::cuda
