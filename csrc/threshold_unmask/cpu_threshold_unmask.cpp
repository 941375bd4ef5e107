// Multiply-adds are fused where reference.py says so and nowhere else (-ffp-contract=off): one more would change the last bit of a
// probability and with it, rarely, a token.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "threshold_unmask/parts.h"

#include "common/simd.h"

namespace llada::LLADA_CPU_LEVEL {
namespace {

constexpr int kHalf = kLanes / 2;
using HalfVec = float __attribute__((vector_size(4 * kHalf)));
using VecD = double __attribute__((vector_size(8 * kHalf)));
using VecL = int64_t __attribute__((vector_size(8 * kHalf)));

constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves an integer in the low bits

inline VecD splat_double(double x) { return x - VecD{}; }

// e^z for z <= 0, e^-64 for anything smaller: the operations of `exponential` in reference.py, one by one.
inline VecD exponential(VecD z) {
  const VecD low = splat_double(-64.0);
  z = z > low ? z : low;
  const VecD shifted = z * 1.4426950408889634 + kRound;
  const VecD k = shifted - kRound;
  const VecD r = (z - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
  VecD p = splat_double(1.0 / 39916800);
  for (double coefficient : {1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
    p = p * r + coefficient;
  const VecL exponent = (VecL)shifted - (VecL)splat_double(kRound);
  return p * (VecD)((exponent + 1023) << 52);
}

inline double exponential(double z) { return exponential(splat_double(z))[0]; }

// 1.5 * 2^e with 2^e > vocab: adding and subtracting it leaves multiples of a unit of which `vocab` terms add up exactly.
inline double grid_constant(int64_t vocab) {
  int bits = 2;
  while (bits < 62 && (vocab >> bits) != 0) ++bits;
  return 1.5 * double(int64_t(1) << bits);
}

inline double reduce_add(VecD v) {
  double sum = v[0];
  for (int i = 1; i < kHalf; ++i) sum += v[i];
  return sum;
}

// f(index, z) over a row in vectors of kHalf, the tail filled with -inf; z = (x - top) / temperature.
template <class T, class F>
inline void each_exponent(const T* x, int64_t vocab, float top, double temperature, F&& f) {
  for (int64_t i = 0; i < vocab; i += kLanes) {
    const Vec v = vocab - i >= kLanes ? load(x + i) : load_partial(x + i, vocab - i, -std::numeric_limits<float>::infinity());
    HalfVec halves[2];
    std::memcpy(halves, &v, sizeof v);
    for (int h = 0; h < 2; ++h) {
      VecD z = __builtin_convertvector(halves[h], VecD) - double(top);
      if (temperature != 1.0) z = z / temperature;
      f(i + h * kHalf, z);
    }
  }
}

constexpr int64_t kRun = 16 * kPart;  // ids of one item of work, so that one position uses several threads
constexpr int kSumLanes = 64;         // as _LANES in reference.py: lane l of a sum takes every 64th weight; then halves are added

// z[i] = e^z[i] for z <= 0, e^-55 for anything below -55, NaN for NaN: the operations of `exponential32` in reference.py, one by one.
// Each operation on all N before the next: one exponential after the other is 12 dependent operations in a row, and a core looks a few
// ahead only. `low` is -55, of which the compiler must not know that it is constant: it would replace the maximum by a comparison and a
// blend.
template <int N>
inline void exponentials(Vec (&z)[N], Vec low) {
  const Vec magic = splat(12582912.f), log2e = splat(1.44269504f);  // 1.5 * 2^23: adding it leaves an integer in the low bits
  Vec k[N], p[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) z[i] = vmax(low, z[i]);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) k[i] = fused_multiply_add(z[i], log2e, magic) - magic;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) z[i] = fused_multiply_add(z[i], log2e, -k[i]);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) p[i] = splat(1.3264727e-3f);
#pragma GCC unroll 5
  for (float coefficient : {9.6715130e-3f, 5.5507336e-2f, 2.4022242e-1f, 6.9314700e-1f, 1.f})
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) p[i] = fused_multiply_add(p[i], z[i], splat(coefficient));
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) z[i] = times_power_of_two(p[i], k[i]);
}

inline bool any(VecI v) {
  int64_t pairs[kLanes / 2], all = 0;
  std::memcpy(pairs, &v, sizeof v);
  for (int64_t pair : pairs) all |= pair;
  return all != 0;
}

// Where a part holds `value` first.
inline int64_t find(const float* x, float value) {
  int64_t i = 0;
  const auto here = [&](int64_t at) { return load(x + at) == splat(value); };
  while (i + 4 * kLanes < kPart && !any((here(i) | here(i + kLanes)) | (here(i + 2 * kLanes) | here(i + 3 * kLanes)))) i += 4 * kLanes;
  while (x[i] != value) ++i;
  return i;
}

inline float largest_lane(Vec v) {  // of no NaN
  Vec4 parts[kLanes / 4];
  std::memcpy(parts, &v, sizeof v);
  for (int half = kLanes / 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] = parts[i] > parts[i + half] ? parts[i] : parts[i + half];
  const Vec4 x = parts[0];
  return std::max(std::max(x[0], x[2]), std::max(x[1], x[3]));
}

// A whole part, the tail filled with -inf, and its largest logit, which is no NaN.
struct Part {
  const float* x;
  float max;
};

// The largest logit of a whole part, 64 by 64; what is not in fp32 is written to `scratch` meanwhile.
template <class T>
class Largest {
 public:
  Largest(const T* x, float* scratch) : x_(x), scratch_(scratch) {}

  inline void step(int64_t i) {
#pragma GCC unroll 16
    for (int64_t at = i; at < i + kSumLanes; at += kLanes) {
      const Vec logits = load(x_ + at);
      if constexpr (kConvert) store(scratch_ + at, logits);
      Vec& largest = largest_[at / kLanes % 4];
      largest = vmax(logits, largest);
    }
  }

  Part part() const {
    const float max = largest_lane(vmax(vmax(largest_[0], largest_[1]), vmax(largest_[2], largest_[3])));
    if constexpr (kConvert)
      return {scratch_, max};
    else
      return {x_, max};
  }

 private:
  static constexpr bool kConvert = !std::is_same_v<T, float>;
  static constexpr float kLowest = -std::numeric_limits<float>::infinity();
  const T* x_;
  float* scratch_;
  Vec largest_[4] = {splat(kLowest), splat(kLowest), splat(kLowest), splat(kLowest)};
};

// The n <= kPart logits at x as a part: where they lie, or in `scratch`.
template <class T>
inline Part whole_part(const T* x, int64_t n, float* scratch) {
  const auto largest = [](auto found) {
    for (int64_t i = 0; i < kPart; i += kSumLanes) found.step(i);
    return found.part();
  };
  if (n == kPart) return largest(Largest<T>(x, scratch));
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(scratch + i, load(x + i));
  for (; i < n; ++i) scratch[i] = to_float(x[i]);
  for (; i < kPart; ++i) scratch[i] = -std::numeric_limits<float>::infinity();
  return largest(Largest<float>(scratch, nullptr));
}

// Meanwhile, 64 logits at a time: meanwhile(i).
template <class F>
PartSum reduce(const Part part, int64_t first, int64_t mask_token_id, Best& best, F&& meanwhile) {
  constexpr float lowest = std::numeric_limits<float>::lowest();
  const int64_t mask = mask_token_id - first;
  if (0 <= mask && mask < kPart) {
    float others[kPart];
    std::memcpy(others, part.x, sizeof others);
    others[mask] = -std::numeric_limits<float>::infinity();
    const float max = whole_part(others, kPart, nullptr).max;  // a whole part of floats is read where it lies
    if (max > best.value) best = {max, first + find(others, max)};
  } else if (part.max > best.value) {
    best = {part.max, first + find(part.x, part.max)};
  }
  constexpr int kVectors = kSumLanes / kLanes, kAtOnce = kLanes == 16 ? 4 : 2;  // by the number of registers
  Vec low = splat(-55.f);
  asm volatile("" : "+m"(low));
  const Vec shift = splat(part.max > lowest ? part.max : lowest);  // finite, if the part has no +inf
  Vec sums[kVectors] = {};
  for (int64_t i = 0; i < kPart; i += kSumLanes) {
    meanwhile(i);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v += kAtOnce) {
      Vec z[kAtOnce];
#pragma GCC unroll 4
      for (int j = 0; j < kAtOnce; ++j) z[j] = load(part.x + i + (v + j) * kLanes) - shift;
      exponentials(z, low);
#pragma GCC unroll 4
      for (int j = 0; j < kAtOnce; ++j) sums[v + j] += z[j];
    }
  }
  for (int half = kVectors / 2; half > 0; half /= 2)
    for (int v = 0; v < half; ++v) sums[v] += sums[v + half];
  float sum = reduce_add(sums[0]);
  if (sum != sum) {  // a NaN, or +inf minus +inf
    sum = 0;
    for (int64_t i = 0; i < kPart; ++i)
      if (part.x[i] != part.x[i]) sum = part.x[i];
  }
  return {part.max, sum};
}

// The first two words of Philox4x32-10 as a number in [0, 1).
inline double philox_uniform(uint64_t seed, uint64_t position, uint64_t forward_index) {
  uint32_t c[4] = {uint32_t(position), uint32_t(position >> 32), uint32_t(forward_index), uint32_t(forward_index >> 32)};
  uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t(c[0]) * 0xD2511F53u, second = uint64_t(c[2]) * 0xCD9E8D57u;
    const uint32_t c0 = uint32_t(second >> 32) ^ c[1] ^ key[0], c2 = uint32_t(first >> 32) ^ c[3] ^ key[1];
    c[0] = c0, c[1] = uint32_t(second), c[2] = c2, c[3] = uint32_t(first);
    key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
  }
  return double(int64_t((uint64_t(c[0]) << 21) | (c[1] >> 11))) * 0x1p-53;
}

// A prefix of the ids sorted by logit, largest first, lowest id first among equals: every id above `key`, and the first `ties` at it.
struct Prefix {
  uint32_t key = 0;
  int64_t ties = 0;
  double mass = 0;  // of the whole prefix
};

// Order-preserving: the larger the float, the larger the key. -0 and +0 are equal.
inline uint32_t order_key(float x) {
  x += 0.f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// The shortest non-empty prefix of at least `count` ids or of at least `mass` (whichever `by_count` says): a radix select, a byte at a
// time.
template <class T>
Prefix shortest_prefix(const T* x, const double* weight, int64_t vocab, bool by_count, int64_t count, double mass) {
  int64_t count_above = 0;
  double mass_above = 0;
  uint32_t fixed = 0, fixed_bits = 0;
  int64_t bin_counts[256];
  double bin_masses[256];
  int bin = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    std::fill(bin_counts, bin_counts + 256, 0);
    std::fill(bin_masses, bin_masses + 256, 0.0);
    for (int64_t i = 0; i < vocab; ++i) {
      const uint32_t key = order_key(to_float(x[i]));
      if ((key & fixed_bits) != fixed) continue;
      ++bin_counts[(key >> shift) & 255];
      bin_masses[(key >> shift) & 255] += weight[i];
    }
    for (bin = 255; bin > 0; --bin) {
      if (bin_counts[bin] > 0 && (by_count ? count_above + bin_counts[bin] >= count : mass_above + bin_masses[bin] >= mass)) break;
      count_above += bin_counts[bin];
      mass_above += bin_masses[bin];
    }
    fixed |= uint32_t(bin) << shift;
    fixed_bits |= 255u << shift;
  }
  // Sums of weights and multiples of one weight are exact (reference.py), so these comparisons are those of a cumulative sum.
  const double one = bin_masses[bin] / double(std::max<int64_t>(bin_counts[bin], 1));
  int64_t ties = 1;
  if (by_count) {
    ties = count - count_above;
  } else {
    while (ties < bin_counts[bin] && mass_above + double(ties) * one < mass) ++ties;
  }
  return {fixed, ties, mass_above + double(ties) * one};
}

struct Choice {
  int64_t token;
  float confidence;
};

inline float ratio(double part, double whole) { return float(part / whole); }

Choice greedy(const PartSum* sums, int64_t parts, int64_t vocab, const Best& best, float top) {
  const double snap = grid_constant(vocab);
  VecD total{};
  for (int64_t i = 0; i < parts; i += kHalf) {
    float max[kHalf], sum[kHalf];  // behind the last part: a sum of 0
    for (int64_t lane = 0; lane < kHalf; ++lane) {
      const PartSum part = i + lane < parts ? sums[i + lane] : PartSum{top, 0};
      max[lane] = part.max, sum[lane] = part.sum;
    }
    HalfVec maxima, totals;
    std::memcpy(&maxima, max, sizeof max);
    std::memcpy(&totals, sum, sizeof sum);
    const VecD z = __builtin_convertvector(maxima, VecD) - double(top);
    total += (__builtin_convertvector(totals, VecD) * exponential(z) + snap) - snap;
  }
  // Not rounded to the grid, so that a confidence is never 0.
  return {best.index, ratio(exponential(double(best.value) - double(top)), reduce_add(total))};
}

// Of whole vectors: the scratch is 0 behind the vocabulary.
inline double block_sum(const double* weight, int64_t n) {
  VecD sum{};
  for (int64_t i = 0; i < n; i += kHalf) {
    VecD v;
    std::memcpy(&v, weight + i, sizeof v);
    sum += v;
  }
  return reduce_add(sum);
}

// `weight` is scratch of vocab numbers, rounded up to whole vectors of kLanes.
template <class T>
Choice sample(const ThresholdUnmaskParams& p, int64_t row, const T* x, const Best& best, float top, double uniform, double* weight) {
  const int64_t vocab = p.vocab;
  const double snap = grid_constant(vocab);
  each_exponent(x, vocab, top, p.temperature[row], [&](int64_t i, VecD z) {
    const VecD w = (exponential(z) + snap) - snap;
    std::memcpy(weight + i, &w, sizeof w);
  });
  const int64_t k = p.top_k == nullptr || p.top_k[row] == 0 ? vocab : std::min(p.top_k[row], vocab);
  const double top_p = p.top_p == nullptr ? 1.0 : p.top_p[row];
  if (k < vocab || top_p < 1.0) {
    Prefix prefix;
    if (k < vocab) prefix = shortest_prefix(x, weight, vocab, true, k, 0);
    if (top_p < 1.0) prefix = shortest_prefix(x, weight, vocab, false, 0, top_p * (k < vocab ? prefix.mass : block_sum(weight, vocab)));
    int64_t ties = prefix.ties;
    for (int64_t i = 0; i < vocab; ++i) {
      const uint32_t key = order_key(to_float(x[i]));
      if (key < prefix.key || (key == prefix.key && ties-- <= 0)) weight[i] = 0;
    }
  }
  const double total = block_sum(weight, vocab);
  weight[p.mask_token_id] = 0;
  const double others = block_sum(weight, vocab);
  if (others == 0) return {best.index, 0.f};
  const double target = uniform * others;
  constexpr int64_t kBlock = 1024;
  double below = 0;
  int64_t i = 0;
  for (double sum; i + kBlock < vocab && below + (sum = block_sum(weight + i, kBlock)) <= target; i += kBlock) below += sum;
  while ((below += weight[i]) <= target) ++i;
  return {i, ratio(weight[i], total)};
}

// Of the positions begin .. end - 1.
template <class T>
void choose_tokens(const ThresholdUnmaskParams& p, const PartSum* all_sums, const Best* all_best, int64_t runs, int64_t begin,
                   int64_t end) {
  const int64_t parts = (p.vocab + kPart - 1) / kPart;
  std::vector<double> scratch;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / p.length, column = item % p.length;
    const PartSum* sums = all_sums + item * parts;
    Best best;
    for (int64_t i = 0; i < runs; ++i)
      if (const Best& other = all_best[item * runs + i]; other.value > best.value) best = other;
    constexpr float inf = std::numeric_limits<float>::infinity();
    float top = -inf;
    bool nan = false;
    for (int64_t i = 0; i < parts; ++i) {
      top = std::max(top, sums[i].max);
      nan |= sums[i].sum != sums[i].sum;
    }
    p.bad[item] = nan ? 'n' : top == inf ? 'i' : best.index < 0 ? 'e' : 0;
    if (p.bad[item] != 0) continue;
    Choice choice;
    if (p.temperature != nullptr && p.temperature[row] > 0) {
      scratch.resize(size_t(p.vocab + kLanes));
      const T* x = static_cast<const T*>(p.logits) + item * p.vocab;
      const int64_t position = p.positions != nullptr ? p.positions[item] : column;
      const double uniform = philox_uniform(uint64_t(p.seed[row]), uint64_t(position), uint64_t(p.forward_index[row]));
      choice = sample(p, row, x, best, top, uniform, scratch.data());
    } else {
      choice = greedy(sums, parts, p.vocab, best, top);
    }
    p.new_tokens[item] = choice.token;
    p.confidence[item] = choice.confidence;
  }
}

// Writes the tokens of one row: new_tokens holds the chosen ones and receives the result.
void apply_rules(const ThresholdUnmaskParams& p, int64_t row, std::vector<int64_t>& candidates) {
  const int64_t* tokens = p.tokens + row * p.length;
  const float* confidence = p.confidence + row * p.length;
  int64_t* out = p.new_tokens + row * p.length;
  const float limit = p.editing_threshold == nullptr ? -1.f : p.editing_threshold[row];
  candidates.clear();
  int64_t confident = 0, edited = 0;
  for (int64_t i = 0; i < p.length; ++i) {
    if (tokens[i] == p.mask_token_id) {
      candidates.push_back(i);
      confident += confidence[i] > p.threshold[row];
      continue;
    }
    const bool may = limit >= 0 && (p.editable == nullptr || p.editable[row * p.length + i]);
    const bool edit = may && out[i] != tokens[i] && confidence[i] > limit;
    edited += edit;
    if (!edit) out[i] = tokens[i];
  }
  const int64_t wanted = p.min_unmask[row], masked = int64_t(candidates.size());
  int64_t accepted = confident;
  if (confident >= wanted) {
    for (int64_t i : candidates)
      if (!(confidence[i] > p.threshold[row])) out[i] = tokens[i];
  } else {
    accepted = std::min(wanted, masked);
    std::stable_sort(candidates.begin(), candidates.end(), [&](int64_t a, int64_t b) { return confidence[a] > confidence[b]; });
    for (int64_t i = accepted; i < masked; ++i) out[candidates[size_t(i)]] = p.mask_token_id;
  }
  p.counts[2 * row] = int32_t(accepted);
  p.counts[2 * row + 1] = int32_t(edited);
}

void apply_rules(const ThresholdUnmaskParams& p) {
  std::vector<int64_t> candidates;
  for (int64_t i = 0; i < p.rows * p.length; ++i)
    if (p.bad[i] != 0) return;
  for (int64_t row = 0; row < p.rows; ++row) apply_rules(p, row, candidates);
}

// Of the runs begin .. end - 1 of kRun ids, counted through all positions.
template <class T>
void reduce_logits(const ThresholdUnmaskParams& p, PartSum* sums, Best* best, int64_t runs, int64_t begin, int64_t end) {
  const int64_t parts = (p.vocab + kPart - 1) / kPart;
  struct Place {
    int64_t run, first;
  };
  const auto logits = [&](Place at) { return static_cast<const T*>(p.logits) + at.run / runs * p.vocab + at.first; };
  const auto size = [&](Place at) { return std::min(kPart, p.vocab - at.first); };
  const auto next = [&](Place at) -> Place {
    const int64_t first = at.first + kPart;
    return first < p.vocab && first % kRun != 0 ? Place{at.run, first} : Place{at.run + 1, (at.run + 1) % runs * kRun};
  };
  const T* last = static_cast<const T*>(p.logits) + std::max<int64_t>(0, p.rows * p.length * p.vocab - kPart);
  float scratch[2][kPart];
  int turn = 0;
  Place at{begin, begin % runs * kRun};
  Part part = whole_part(logits(at), size(at), scratch[turn]);
  while (at.run < end) {
    PartSum& sum = sums[at.run / runs * parts + at.first / kPart];
    Best& own = best[at.run];
    const int64_t first = at.first;
    at = next(at), turn ^= 1;
    if (at.run < end && size(at) == kPart) {
      // The fourth part from here is fetched: hardware stops at the end of a page, which is one part of floats. One thread took 0.96 ms
      // for 20 MB from memory with the second part, 0.70 ms with the fourth. Floats into the second-level cache: 0.95 -> 0.82 ms on Zen 4,
      // whose nearest has 32 KB; bf16 are half as much and better in the nearest, 0.66 against 0.76 ms.
      constexpr int kNear = sizeof(T) == 4 ? 2 : 3;
      const T* fetched = last - std::max<int64_t>(0, last - logits(at) - 3 * kPart);
      Largest<T> largest(logits(at), scratch[turn]);
      sum = reduce(part, first, p.mask_token_id, own, [&](int64_t i) {
        constexpr int64_t kLine = 64 / sizeof(T);
#pragma GCC unroll 4
        for (int64_t line = 0; line < kSumLanes; line += kLine) __builtin_prefetch(fetched + i + line, 0, kNear);
        largest.step(i);
      });
      part = largest.part();
    } else {
      sum = reduce(part, first, p.mask_token_id, own, [](int64_t) {});
      if (at.run < end) part = whole_part(logits(at), size(at), scratch[turn]);
    }
  }
}

template <class T>
void unmask(const ThresholdUnmaskParams& p, const Parallel& parallel) {
  const int64_t positions = p.rows * p.length, runs = (p.vocab + kRun - 1) / kRun;
  std::vector<PartSum> sums(size_t(positions * ((p.vocab + kPart - 1) / kPart)));
  std::vector<Best> best(size_t(positions * runs));
  // One stretch of memory per thread: threads that take turns fetch each other's pages ahead, which took half as long again.
  const auto reduce = [&](int64_t begin, int64_t end) { reduce_logits<T>(p, sums.data(), best.data(), runs, begin, end); };
  const auto choose = [&](int64_t begin, int64_t end) { choose_tokens<T>(p, sums.data(), best.data(), runs, begin, end); };
  if (positions % parallel.num_threads() == 0 || positions >= 8 * parallel.num_threads()) {
    parallel.ranges(positions, 1, [&](int64_t begin, int64_t end) {
      reduce(begin * runs, end * runs);
      choose(begin, end);
    });
  } else {  // too few to share them out evenly
    parallel.ranges(positions * runs, 1, reduce);
    parallel.ranges(positions, p.temperature != nullptr ? 1 : 64, choose);
  }
  apply_rules(p);
}

}  // namespace

PartSum reduce_part(const float* x, int64_t n, int64_t first, int64_t mask_token_id, Best& best) {
  float scratch[kPart];
  return reduce(whole_part(x, n, scratch), first, mask_token_id, best, [](int64_t) {});
}

void decide(const ThresholdUnmaskParams& p, const PartSum* sums, const Best* best, int64_t runs, const Parallel& parallel) {
  parallel.ranges(p.rows * p.length, 64, [&](int64_t begin, int64_t end) {
    p.bf16 ? choose_tokens<bf16>(p, sums, best, runs, begin, end) : choose_tokens<float>(p, sums, best, runs, begin, end);
  });
  apply_rules(p);
}

void threshold_unmask(const ThresholdUnmaskParams& p, const Parallel& parallel) {
  p.bf16 ? unmask<bf16>(p, parallel) : unmask<float>(p, parallel);
}

}  // namespace llada::LLADA_CPU_LEVEL
