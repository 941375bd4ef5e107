// SIMD for kernels, written once with GCC's vector extensions: the compiler lowers it to the registers of the level.
//
// A kernel file includes the standard headers and its params.h FIRST and this header LAST: everything after the pragma below is compiled
// for the level, while templates of the standard library stay at the baseline (compiled for AVX-512 they could be kept by the
// linker for the whole program and crash older machines). Kernels live in `namespace llada::LLADA_CPU_LEVEL`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

// A level has what the ones below it have. Both levels of AMX multiply bf16 on tiles; amx_emulated is portable code otherwise.
#if defined(LLADA_CPU_LEVEL_amx) || defined(LLADA_CPU_LEVEL_amx_emulated)
#define LLADA_MATRIX_TILES
#endif
#if defined(LLADA_CPU_LEVEL_amx)
#define LLADA_CPU_LEVEL_avx512_bf16
#endif
#if defined(LLADA_CPU_LEVEL_avx512_bf16)
#define LLADA_CPU_LEVEL_avx512
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(LLADA_CPU_LEVEL_amx)
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,prefer-vector-width=512")
#elif defined(LLADA_CPU_LEVEL_avx512_bf16)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,prefer-vector-width=512")
#elif defined(LLADA_CPU_LEVEL_avx512)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#elif defined(LLADA_CPU_LEVEL_avx2)
#pragma GCC target("avx2,fma")
#endif

namespace llada::LLADA_CPU_LEVEL {
namespace {

#if defined(LLADA_CPU_LEVEL_avx512) || defined(LLADA_MATRIX_TILES)
constexpr int kLanes = 16;  // of amx_emulated as well: operands are packed for tiles
#elif defined(LLADA_CPU_LEVEL_avx2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2 and NEON
#endif

using Vec = float __attribute__((vector_size(4 * kLanes)));
using VecI = int32_t __attribute__((vector_size(4 * kLanes)));
using VecU = uint32_t __attribute__((vector_size(4 * kLanes)));
using VecH = uint16_t __attribute__((vector_size(2 * kLanes)));

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {  // to nearest, ties to even, as PyTorch
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
// Rounds to T and back: the rounding points of the official model.
template <class T>
inline float round_to(float x) {
  return to_float(from_float<T>(x));
}

inline Vec splat(float x) { return x - Vec{}; }
inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec load(const bf16* p) {
  VecH h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, VecU) << 16);
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline VecH to_bf16_bits(Vec v) {
  const VecU bits = (VecU)v;
  const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : VecU{} + 0x7fc0, VecH);
}
inline void store(bf16* p, Vec v) {
  const VecH h = to_bf16_bits(v);
  std::memcpy(p, &h, sizeof h);
}
// Two vectors in a row. Where the processor rounds to bf16 itself, numbers below 2^-126 become 0 and NaN keeps its sign.
inline void store_both(float* p, Vec low, Vec high) { store(p, low), store(p + kLanes, high); }
inline void store_both(bf16* p, Vec low, Vec high) {
#if defined(LLADA_CPU_LEVEL_avx512_bf16)
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  std::memcpy(p, &both, sizeof both);
#else
  store(p, low), store(p + kLanes, high);
#endif
}
// As store_both, past the caches where the level has whole lines for that (p: at the begin of one); finish_streamed() before anybody
// else reads.
template <class T>
inline void store_streamed(T* p, Vec low, Vec high) {
#if defined(LLADA_CPU_LEVEL_avx512)
  alignas(64) T both[2 * kLanes];
  store_both(both, low, high);
  for (size_t i = 0; i < sizeof both / 64; ++i) {
    __m512i line;
    std::memcpy(&line, reinterpret_cast<const char*>(both) + i * 64, sizeof line);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p) + i, line);
  }
#else
  store_both(p, low, high);
#endif
}
inline void finish_streamed() {
#if defined(LLADA_CPU_LEVEL_avx512)
  _mm_sfence();
#endif
}
template <class T>
inline Vec round_to(Vec v);
template <>
inline Vec round_to<float>(Vec v) {
  return v;
}
template <>
inline Vec round_to<bf16>(Vec v) {
  const VecU bits = (VecU)v;
  const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  return v == v ? (Vec)rounded : v;
}

// The first n < kLanes lanes, the rest `fill`.
template <class T>
inline Vec load_partial(const T* p, int64_t n, float fill = 0.f) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return load(lanes);
}
template <class T>
inline void store_partial(T* p, Vec v, int64_t n) {
  T lanes[kLanes];
  store(lanes, v);
  const T* from = lanes;
  for (int64_t part = kLanes / 2; part > 0; part /= 2) {  // by the bits of n: copies of known sizes
    if (!(n & part)) continue;
    std::memcpy(p, from, size_t(part) * sizeof(T));
    p += part, from += part;
  }
}

// a * b + c, rounded once wherever this is compiled: the level `portable` asks the C library where SSE has no such instruction.
inline Vec fused_multiply_add(Vec a, Vec b, Vec c) {
#if defined(LLADA_CPU_LEVEL_avx512)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(LLADA_CPU_LEVEL_avx2)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  for (int i = 0; i < kLanes; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#endif
}

// x * 2^k for a whole number k, neither operand nor result subnormal; NaN stays NaN.
inline Vec times_power_of_two(Vec x, Vec k) {
#if defined(LLADA_CPU_LEVEL_avx512)
  return (Vec)_mm512_scalef_ps((__m512)x, (__m512)k);
#else
  return x * (Vec)((__builtin_convertvector(k, VecI) + 127) << 23);
#endif
}

inline Vec vmax(Vec a, Vec b) {  // b where one of them is NaN
#if defined(LLADA_CPU_LEVEL_avx512)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);  // GCC 12 would compare and blend
#else
  return a > b ? a : b;
#endif
}
inline Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
using Vec4 = float __attribute__((vector_size(16)));
inline float reduce_add(Vec v) {  // halves onto each other: the same tree at every call
  Vec4 parts[kLanes / 4];
  std::memcpy(parts, &v, sizeof v);
  for (int half = kLanes / 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  const Vec4 x = parts[0];
  return (x[0] + x[2]) + (x[1] + x[3]);
}
inline float reduce_max(Vec v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// e^x, relative error below 2e-7 on [-87, 88]; 0 below (also for -inf), +inf above; NaN stays NaN.
inline Vec vexp(Vec x) {
#if defined(LLADA_CPU_LEVEL_avx512)
  const Vec clamped = (Vec)_mm512_min_ps((__m512)splat(100.f), (__m512)x);  // NaN stays NaN in this order
#else
  const Vec clamped = vmin(vmax(x, splat(-87.5f)), splat(88.7f));
#endif
  const Vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (clamped * 1.44269504f + magic) - magic;
  Vec r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
#if defined(LLADA_CPU_LEVEL_avx512)
  return (Vec)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)splat(-87.5f), _CMP_NLT_UQ), (__m512)y, (__m512)n);
#else
  const VecI exponent = __builtin_convertvector(n, VecI);
  const VecI half = exponent >> 1;  // 2^n in two factors: n = 128 would overflow in one
  y = y * (Vec)((half + 127) << 23) * (Vec)((exponent - half + 127) << 23);
  y = x < -87.5f ? Vec{} : y;
  y = x > 88.72284f ? splat(std::numeric_limits<float>::infinity()) : y;
  return x == x ? y : x;
#endif
}

// What one element of T is multiplied as: how many k a packed 32-bit element holds.
template <class T>
constexpr int kPackedDepth = 1;
#if defined(LLADA_CPU_LEVEL_avx512_bf16) || defined(LLADA_MATRIX_TILES)
template <>
constexpr int kPackedDepth<bf16> = 2;
#endif

// Whether products of T run on tiles (common/tile_gemm.h).
template <class T>
constexpr bool kOnTiles = false;
#if defined(LLADA_MATRIX_TILES)
template <>
constexpr bool kOnTiles<bf16> = true;
#endif

// kLanes packed elements that follow each other in k.
template <class T>
inline VecU load_packed(const T* b) {
  if constexpr (kPackedDepth<T> == 2) {
    VecU v;
    std::memcpy(&v, b, sizeof v);
    return v;
  } else {
    return (VecU)load(b);
  }
}

// acc + the products of both halves of each pair of bf16 (only where kPackedDepth<bf16> is 2).
inline Vec multiply_add_pairs(Vec acc, VecU a, VecU b) {
#if defined(LLADA_CPU_LEVEL_avx512_bf16)
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  return acc + (Vec)(a << 16) * (Vec)(b << 16) + (Vec)(a & 0xffff0000u) * (Vec)(b & 0xffff0000u);
#endif
}

}  // namespace
}  // namespace llada::LLADA_CPU_LEVEL
