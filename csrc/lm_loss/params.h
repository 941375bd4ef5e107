#pragma once

#include "common/cpu_level.h"

namespace llada {

enum class EntropyOf : int64_t { none = 0, all = 1, correct = 2 };

// Statistics of a token's logits z, saved for the backward: max z, log sum e^(z - max), log sum e^((z - max) / T), entropy at T.
struct TokenStatistics {
  float max, log_sum, tempered_log_sum, entropy;
};

struct LmLossParams {
  bool bf16;  // else fp32
  int64_t tokens, kept, width, vocab;
  EntropyOf entropy_of;
  float temperature;
  const void *hidden, *lm_head;  // [tokens, width], [vocab, width]
  const int64_t* targets;        // [tokens]
  const float* weights;          // [tokens]
  const int64_t* index;          // [kept]: the tokens of non-zero weight, rising; the others are not read
  float* loss;                   // one number
  float* token_losses;           // [tokens], zero on entry, as the next three
  float* entropy;                // [tokens] or null
  bool* correct;                 // [tokens]
  TokenStatistics* statistics;   // [tokens]
};

struct LmLossBackwardParams {
  bool bf16;
  int64_t tokens, kept, width, vocab;
  float temperature;
  const void *hidden, *lm_head;
  const int64_t *targets, *index;
  const TokenStatistics* statistics;
  const float* grad_cross_entropy;  // [kept]
  const float* grad_entropy;        // [kept] or null
  void* grad_hidden;                // [tokens, width], zero on entry, or null: not wanted
  void* grad_lm_head;               // [vocab, width] or null
};

LLADA_DECLARE_CPU_MATRIX_KERNEL(lm_loss, LmLossParams)
LLADA_DECLARE_CPU_MATRIX_KERNEL(lm_loss_backward, LmLossBackwardParams)

}  // namespace llada
