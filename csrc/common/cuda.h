// What the kernels use of CUDA: shared memory, warp reductions, dtypes, launches. nvcc makes CUDA of it. The tests compile the same kernels
// with a C++ compiler and LLADA_CUDA_EMULATED, and every thread of every block then runs on the CPU (python_tests/cuda_emulation).
// C++17: kernels see neither torch nor CUTLASS.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef LLADA_CUDA_EMULATED
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif

namespace llada::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct bf16 {
  uint16_t bits;
};

#ifndef LLADA_CUDA_EMULATED

// The T of this block. One per type: a kernel puts all its static shared memory into one struct.
template <class T>
__device__ __forceinline__ T& shared() {
  __shared__ alignas(16) unsigned char bytes[sizeof(T)];
  return reinterpret_cast<T&>(bytes);
}

// What the launch asked for besides, at most 48 KB together.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_bytes[];
  return reinterpret_cast<T*>(dynamic_bytes);
}

// Runs kernel(args...) on `stream`; returns the cudaError_t of this launch.
template <class... P, class... A>
int launch(void (*kernel)(P...), int64_t blocks, int threads, size_t dynamic_bytes, void* stream, const A&... args) {
  if (blocks == 0) return cudaSuccess;
  return [&](P... values) {
    void* pointers[] = {static_cast<void*>(&values)...};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                            dim3(static_cast<unsigned>(threads)), pointers, dynamic_bytes, static_cast<cudaStream_t>(stream));
  }(args...);
}

__device__ __forceinline__ bf16 round_to_bf16(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }

// The larger one, NaN where one is NaN.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

#else

inline bf16 round_to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {uint16_t(bits >> 16 | 64)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 2)
    return round_to_bf16(x);
  else
    return x;
}

// To the nearest T and back.
template <class T>
__device__ __forceinline__ float round_to(float x) {
  return to_float(from_float<T>(x));
}

// N numbers that one access moves: the address must be a multiple of their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* x) {
#ifdef LLADA_CUDA_EMULATED
  emulation::check(reinterpret_cast<uintptr_t>(x) % sizeof(Pack<T, N>) == 0,
                   "a vector is loaded from an address that is not a multiple of its size");
#endif
  return *reinterpret_cast<const Pack<T, N>*>(x);
}

template <int N, class T>
__device__ __forceinline__ void store_pack(T* x, const Pack<T, N>& values) {
#ifdef LLADA_CUDA_EMULATED
  emulation::check(reinterpret_cast<uintptr_t>(x) % sizeof(Pack<T, N>) == 0,
                   "a vector is stored to an address that is not a multiple of its size");
#endif
  *reinterpret_cast<Pack<T, N>*>(x) = values;
}

// f(a, b) over the lanes of a warp, the same in each: halves are combined, so f must be commutative; the order is fixed.
template <class T, class F>
__device__ __forceinline__ T warp_reduce(T x, F&& f) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = f(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  return warp_reduce(x, [](T a, T b) { return a + b; });
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace llada::cuda
