// RMSNorm of a row held by one warp or by a block: what rms_norm and rope have in common. Roundings as on a CPU (csrc/rms_norm/rows.h).
#pragma once

#include "common/cuda.h"

namespace llada::cuda {

// Rows whose weight gradients are summed one after the other, and the sums of such chunks in order: the same bits in every run.
constexpr int kNormChunk = 128;

// Sum over the threads of a block, the same in each, in a fixed order. partial: 32 floats of shared memory; a barrier before the next use.
__device__ __forceinline__ float block_sum(float x, float* partial) {
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  x = warp_sum(x);
  if (warps == 1) return x;
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : 0.f);
}

// How many numbers a thread takes at once, as a type, so that it is known when the code is compiled.
template <int N>
struct Count {
  static constexpr int value = N;
};

// f(i, Count<k>) for the numbers i .. i + k - 1 of a row of n that thread `thread` of `threads` takes: packs of 16 bytes, then single ones.
// Which thread takes what depends on n, so that sums over a row do not depend on where it lies.
template <class T, class F>
__device__ __forceinline__ void each_pack(int64_t n, int thread, int threads, F&& f) {
  constexpr int kPack = 16 / sizeof(T);
  const int64_t main = n / kPack * kPack;
  for (int64_t i = thread * kPack; i < main; i += threads * kPack) f(i, Count<kPack>{});
  for (int64_t i = main + thread; i < n; i += threads) f(i, Count<1>{});
}

// `aligned`: the address is a multiple of 16 wherever N is a whole pack.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_some(const T* x, bool aligned) {
  if (N > 1 && aligned) return load_pack<N>(x);
  Pack<T, N> values;
#pragma unroll
  for (int j = 0; j < N; ++j) values.at[j] = x[j];
  return values;
}

template <int N, class T>
__device__ __forceinline__ void store_some(T* x, const Pack<T, N>& values, bool aligned) {
  if (N > 1 && aligned) return store_pack(x, values);
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = values.at[j];
}

// Threads that sum a row: one warp for a head, so that rope, which has a warp per head, gives the same bits.
constexpr int64_t kOneWarp = 512;
inline int norm_threads(int64_t n, int pack) {
  const int64_t warps = n <= kOneWarp ? 1 : divide_up(divide_up(n, pack), kWarp);
  return kWarp * int(warps > 16 ? 16 : warps);
}

// 1 / sqrt(mean of n squares + eps).
__device__ __forceinline__ float norm_factor(float squares, int64_t n, float eps) { return 1.f / sqrtf(squares / float(n) + eps); }

// Within 2 ulp; an exact division is a call that spills registers in rope.
__device__ __forceinline__ float row_mean(float sum, int64_t n) { return __fdividef(sum, float(n)); }

// One element of y = weight * T(x * rstd).
template <class T>
__device__ __forceinline__ T norm_element(float x, float rstd, float weight) {
  return from_float<T>(weight * round_to<T>(x * rstd));
}

// With z = x * rstd and dz = T(dy * weight): dx = (dz - z * mean(dz * z)) * rstd, dw = sum over rows of T(dy * T(z)).
template <class T>
struct NormGradient {
  float z, dz, dw;

  __device__ __forceinline__ NormGradient(float dy, float x, float weight, float rstd)
      : z(x * rstd), dz(round_to<T>(dy * weight)), dw(round_to<T>(dy * round_to<T>(z))) {}
  __device__ __forceinline__ float dx(float mean, float rstd) const { return (dz - z * mean) * rstd; }
};

// dw[i] = partial[0][i] + partial[1][i] + ...: a thread per i.
template <class T>
__global__ void __launch_bounds__(256) sum_norm_chunks(const float* partial, int64_t chunks, int64_t n, T* dw) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= n) return;
  float sum = 0.f;
  for (int64_t c = 0; c < chunks; ++c) sum += partial[c * n + i];
  dw[i] = sum;
}

}  // namespace llada::cuda
