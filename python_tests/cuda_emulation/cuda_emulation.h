// CUDA on a CPU, for tests: as much of the language as csrc/**/*.cuh uses. Every thread of a block is a fiber with a stack of its own;
// blocks run one after the other. A barrier or a warp operation that some threads never reach is an error, so is memory written behind the
// dynamic shared memory. Shared memory is filled with NaN before each block. The order in which threads and blocks run can be changed
// (set_order): a result that depends on it shows a race.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __device__
#define __host__
#define __global__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

namespace emulation {

struct Position {
  uint3 thread{0, 0, 0}, block{0, 0, 0}, threads{1, 1, 1}, blocks{1, 1, 1};
};
extern Position now;

constexpr int kFailed = 1000;

void check(bool good, const char* text);  // ends the launch with this error
int run(int64_t blocks, int threads, size_t dynamic_bytes, const std::function<void()>& body);
const char* last_error();
void fail_next();           // the next launch fails
void set_order(int order);  // 0: rising, 1: falling, other: shuffled with this seed
void barrier();
// Every lane of the warp gives 64 bits; returns those of all lanes.
const uint64_t* exchange(uint64_t bits);
void* dynamic_memory();
int64_t block_serial();
void poison(void* memory, size_t size);

template <class T>
uint64_t to_bits(T x) {
  static_assert(sizeof(T) <= 8, "at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline unsigned lane() { return now.thread.x % 32; }

}  // namespace emulation

#define threadIdx (emulation::now.thread)
#define blockIdx (emulation::now.block)
#define blockDim (emulation::now.threads)
#define gridDim (emulation::now.blocks)

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp() { emulation::exchange(0); }
template <class T>
T __shfl_sync(unsigned, T x, unsigned source) {
  return emulation::from_bits<T>(emulation::exchange(emulation::to_bits(x))[source % 32]);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, unsigned mask) {
  return emulation::from_bits<T>(emulation::exchange(emulation::to_bits(x))[emulation::lane() ^ mask]);
}
template <class T>
T __shfl_up_sync(unsigned, T x, unsigned distance) {
  const unsigned lane = emulation::lane();
  const uint64_t* all = emulation::exchange(emulation::to_bits(x));
  return emulation::from_bits<T>(all[lane < distance ? lane : lane - distance]);
}
inline unsigned __ballot_sync(unsigned, bool x) {
  const uint64_t* all = emulation::exchange(x);
  unsigned mask = 0;
  for (int i = 0; i < 32; ++i) mask |= unsigned(all[i] != 0) << i;
  return mask;
}
template <class T>
unsigned __match_any_sync(unsigned, T x) {
  const uint64_t* all = emulation::exchange(emulation::to_bits(x));
  unsigned mask = 0;
  for (int i = 0; i < 32; ++i) mask |= unsigned(all[i] == emulation::to_bits(x)) << i;
  return mask;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __uint_as_float(uint32_t x) { return emulation::from_bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return uint32_t(emulation::to_bits(x)); }
inline double __longlong_as_double(long long x) { return emulation::from_bits<double>(uint64_t(x)); }
inline long long __double_as_longlong(double x) { return static_cast<long long>(emulation::to_bits(x)); }
template <class T>
T atomicAdd(T* to, T x) {
  const T before = *to;
  *to = before + x;
  return before;
}
template <class T>
T atomicMin(T* to, T x) {
  const T before = *to;
  *to = x < before ? x : before;
  return before;
}

namespace llada::cuda {

struct bf16;

template <class T>
T& shared() {
  alignas(16) static unsigned char bytes[sizeof(T)];
  static int64_t serial = -1;
  if (serial != emulation::block_serial()) {
    emulation::poison(bytes, sizeof bytes);
    serial = emulation::block_serial();
  }
  return reinterpret_cast<T&>(bytes);
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(emulation::dynamic_memory());
}

template <class... P, class... A>
int launch(void (*kernel)(P...), int64_t blocks, int threads, size_t dynamic_bytes, void*, const A&... args) {
  return emulation::run(blocks, threads, dynamic_bytes, [&] { kernel(static_cast<P>(args)...); });
}

inline float max_or_nan(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }

}  // namespace llada::cuda
