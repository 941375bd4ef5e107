// The arithmetic of the sampler, operation by operation that of llada_kernels/ops/threshold_unmask/reference.py. Multiply-adds are fused
// where it says so and nowhere else (-fmad=false): one more would change the last bit of a probability and with it, rarely, a token.
#pragma once

#include "common/cuda.h"
#include "threshold_unmask/params.h"

namespace llada::cuda {

constexpr int kPart = 1024;  // ids of a part, as _PART in reference.py: it decides about the last bits of a confidence

#define LLADA_INFINITY __uint_as_float(0x7f800000u)

// Of one part: the largest logit (NaN if one is), the sum of e^(logit - max), the largest without the mask token's.
struct PartResult {
  float max, sum, best;
};

// Workspace of a call.
struct UnmaskScratch {
  PartResult* results;  // [positions, parts]
  float* tops;          // [positions]: the largest logit
  int parts;
};

// e^z for z <= 0, e^-55 for anything below -55: `exponential32` in reference.py. z is no NaN.
__device__ __forceinline__ float exponential(float z) {
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  z = fmaxf(z, -55.f);
  const float shifted = __fmaf_rn(z, 1.44269504f, magic);
  const float r = __fmaf_rn(z, 1.44269504f, magic - shifted);
  float p = __fmaf_rn(1.3264727e-3f, r, 9.6715130e-3f);
  p = __fmaf_rn(p, r, 5.5507336e-2f);
  p = __fmaf_rn(p, r, 2.4022242e-1f);
  p = __fmaf_rn(p, r, 6.9314700e-1f);
  p = __fmaf_rn(p, r, 1.f);
  return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));  // times 2^integer
}

// e^z for z <= 0, e^-64 for anything smaller: `exponential` in reference.py.
__device__ __forceinline__ double exponential(double z) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  z = z > -64.0 ? z : -64.0;
  const double shifted = z * 1.4426950408889634 + magic;
  const double k = shifted - magic;
  const double r = (z - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
  double p = 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const long long exponent = __double_as_longlong(shifted) - __double_as_longlong(magic);
  return p * __longlong_as_double((exponent + 1023) << 52);
}

// 1.5 * 2^e with 2^e > vocab: adding and subtracting it leaves multiples of 2^(e - 52), of which `vocab` terms add up exactly.
__device__ __forceinline__ double grid_constant(int64_t vocab) {
  int bits = 2;
  while (bits < 62 && (vocab >> bits) != 0) ++bits;
  return 1.5 * double(int64_t(1) << bits);
}

// A weight in [0, 1] in units of that grid: sums of integers are exact in any order.
__device__ __forceinline__ int64_t to_units(double weight, double snap) {
  return __double_as_longlong(weight + snap) - __double_as_longlong(snap);
}

__device__ __forceinline__ float ratio(double part, double whole) { return float(part / whole); }

// The first two words of Philox4x32-10 as a number in [0, 1).
__device__ inline double philox_uniform(uint64_t seed, uint64_t position, uint64_t forward_index) {
  uint32_t c0 = uint32_t(position), c1 = uint32_t(position >> 32), c2 = uint32_t(forward_index), c3 = uint32_t(forward_index >> 32);
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t(c0) * 0xD2511F53u, second = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(second >> 32) ^ c1 ^ key0;
    c1 = uint32_t(second);
    c2 = uint32_t(first >> 32) ^ c3 ^ key1;
    c3 = uint32_t(first);
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return double(int64_t((uint64_t(c0) << 21) | (c1 >> 11))) * (1.0 / 9007199254740992.0);
}

// Order-preserving: the larger the float, the larger the key. -0 and +0 are equal.
__device__ __forceinline__ uint32_t order_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

}  // namespace llada::cuda
