// What threshold_unmask shares with lm_head_unmask, which sees the logits of a position only part by part: the reduction of a part, and
// the decision from the reduced parts. Defined in cpu_threshold_unmask.cpp, where every rounding is part of the contract.
#pragma once

#include <limits>

#include "threshold_unmask/params.h"

namespace llada::LLADA_VECTOR_LEVEL {

constexpr int64_t kPart = 1024;  // ids of a part, as _PART in reference.py: it decides about the last bits of a confidence

// Of one part: the largest logit, and the sum of e^(logit - max); the sum is NaN where a logit is.
struct PartSum {
  float max, sum;
};

// The largest logit without the mask token's, and its id, the lowest among equals.
struct Best {
  float value = -std::numeric_limits<float>::infinity();
  int64_t index = -1;
};

// x: the logits of the ids first .. first + n - 1, 0 < n <= kPart, first a multiple of kPart; merged into `best` if they are the next ones.
PartSum reduce_part(const float* x, int64_t n, int64_t first, int64_t mask_token_id, Best& best);

// Results from sums [rows * length, parts of the vocabulary] and best [rows * length, runs], the runs in order of their ids. p.logits are
// read where the temperature is above 0 only.
void decide(const ThresholdUnmaskParams& p, const PartSum* sums, const Best* best, int64_t runs, const Parallel& parallel);

}  // namespace llada::LLADA_VECTOR_LEVEL

namespace llada::LLADA_CPU_LEVEL {
using namespace LLADA_VECTOR_LEVEL;
}
