#include "lm_loss/params.h"

#include "bindings/tensor_checks.h"

namespace llada {
namespace {

// The tokens of non-zero weight; their targets are checked, those of the others may be anything.
std::vector<int64_t> kept_tokens(const Tensor& weights, const Tensor& targets, int64_t vocab) {
  const float* weight = static_cast<const float*>(weights.const_data_ptr());
  const int64_t* target = static_cast<const int64_t*>(targets.const_data_ptr());
  std::vector<int64_t> index;
  for (int64_t i = 0; i < weights.numel(); ++i) {
    if (weight[i] == 0.f) continue;
    check(0 <= target[i] && target[i] < vocab, "targets: expected ids in [0, ", vocab, ") where the weight is not 0, got ", target[i],
          " at position ", i);
    index.push_back(i);
  }
  return index;
}

void check_inputs(const Tensor& hidden, const Tensor& lm_head, const Tensor& targets, const Tensor& weights) {
  check(hidden.dim() == 2, "hidden: expected 2 dimensions, got shape ", shape_text(hidden));
  check_float_dtype("hidden", hidden);
  check_tensor("hidden", hidden, hidden.scalar_type(), {-1, -1});
  check_tensor("lm_head", lm_head, hidden.scalar_type(), {-1, hidden.size(1)});
  check_tensor("targets", targets, ScalarType::Long, {hidden.size(0)});
  check_tensor("weights", weights, ScalarType::Float, {hidden.size(0)});
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  Tensor x = empty_beside(like, shape, dtype);
  torch::stable::zero_(x);
  return x;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lm_loss(const Tensor& hidden, const Tensor& lm_head, const Tensor& targets,
                                                           const Tensor& weights, int64_t entropy_of, double temperature) {
  check_inputs(hidden, lm_head, targets, weights);
  check(0 <= entropy_of && entropy_of <= 2, "entropy_of: expected 0, 1 or 2, got ", entropy_of);
  const int64_t tokens = hidden.size(0), vocab = lm_head.size(0);
  const std::vector<int64_t> index = kept_tokens(weights, targets, vocab);
  const bool with_entropy = entropy_of != int64_t(EntropyOf::none);
  Tensor loss = zeros(hidden, {}, ScalarType::Float);
  Tensor token_losses = zeros(hidden, {tokens}, ScalarType::Float);
  Tensor entropy = zeros(hidden, {with_entropy ? tokens : 0}, ScalarType::Float);
  Tensor correct = zeros(hidden, {tokens}, ScalarType::Bool);
  Tensor statistics = zeros(hidden, {tokens, 4}, ScalarType::Float);
  lm_loss_cpu(
      {hidden.scalar_type() == ScalarType::BFloat16, tokens, int64_t(index.size()), hidden.size(1), vocab, EntropyOf(entropy_of),
       float(temperature), hidden.const_data_ptr(), lm_head.const_data_ptr(), static_cast<const int64_t*>(targets.const_data_ptr()),
       static_cast<const float*>(weights.const_data_ptr()), index.data(), static_cast<float*>(loss.mutable_data_ptr()),
       static_cast<float*>(token_losses.mutable_data_ptr()), with_entropy ? static_cast<float*>(entropy.mutable_data_ptr()) : nullptr,
       static_cast<bool*>(correct.mutable_data_ptr()), static_cast<TokenStatistics*>(statistics.mutable_data_ptr())},
      torch_threads());
  return {loss, token_losses, entropy, correct, statistics};
}

std::tuple<Tensor, Tensor> lm_loss_backward(const Tensor& grad_loss, const Tensor& grad_token_losses, const Tensor& grad_entropy,
                                            const Tensor& hidden, const Tensor& lm_head, const Tensor& targets, const Tensor& weights,
                                            const Tensor& correct, const Tensor& statistics, int64_t entropy_of, double temperature,
                                            bool need_hidden, bool need_lm_head) {
  check_inputs(hidden, lm_head, targets, weights);
  const int64_t tokens = hidden.size(0), width = hidden.size(1), vocab = lm_head.size(0);
  const bool with_entropy = entropy_of != int64_t(EntropyOf::none);
  check_tensor("grad_loss", grad_loss, ScalarType::Float, {});
  check_tensor("grad_token_losses", grad_token_losses, ScalarType::Float, {tokens});
  check_tensor("grad_entropy", grad_entropy, ScalarType::Float, {with_entropy ? tokens : 0});
  check_tensor("correct", correct, ScalarType::Bool, {tokens});
  check_tensor("statistics", statistics, ScalarType::Float, {tokens, 4});
  const std::vector<int64_t> index = kept_tokens(weights, targets, vocab);
  const float* weight = static_cast<const float*>(weights.const_data_ptr());
  const float* per_token = static_cast<const float*>(grad_token_losses.const_data_ptr());
  const float* per_entropy = static_cast<const float*>(grad_entropy.const_data_ptr());
  const bool* is_correct = static_cast<const bool*>(correct.const_data_ptr());
  const float whole = *static_cast<const float*>(grad_loss.const_data_ptr());
  std::vector<float> cross_entropy, entropy;
  for (int64_t i : index) {
    cross_entropy.push_back(whole * weight[i] + per_token[i]);
    if (with_entropy) entropy.push_back(entropy_of == int64_t(EntropyOf::all) || is_correct[i] ? per_entropy[i] : 0.f);
  }
  Tensor grad_hidden = zeros(hidden, {need_hidden ? tokens : 0, width}, hidden.scalar_type());
  Tensor grad_lm_head = empty_beside(lm_head, {need_lm_head ? vocab : 0, width}, hidden.scalar_type());
  lm_loss_backward_cpu(
      {hidden.scalar_type() == ScalarType::BFloat16, tokens, int64_t(index.size()), width, vocab, float(temperature),
       hidden.const_data_ptr(), lm_head.const_data_ptr(), static_cast<const int64_t*>(targets.const_data_ptr()), index.data(),
       static_cast<const TokenStatistics*>(statistics.const_data_ptr()), cross_entropy.data(), with_entropy ? entropy.data() : nullptr,
       need_hidden ? grad_hidden.mutable_data_ptr() : nullptr, need_lm_head ? grad_lm_head.mutable_data_ptr() : nullptr},
      torch_threads());
  return {grad_hidden, grad_lm_head};
}

}  // namespace
}  // namespace llada

STABLE_TORCH_LIBRARY_IMPL(llada_kernels, CPU, m) {
  m.impl("lm_loss", TORCH_BOX(&llada::lm_loss));
  m.impl("lm_loss_backward", TORCH_BOX(&llada::lm_loss_backward));
}
