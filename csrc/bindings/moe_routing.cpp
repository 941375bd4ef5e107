#include "moe_routing/params.h"

#include "bindings/tensor_checks.h"

#include <optional>

namespace llada {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_routing(const Tensor& logits, std::optional<Tensor> expert_bias, int64_t top_k,
                                                       int64_t n_group, int64_t topk_group, double scale, bool softmax, bool normalize,
                                                       int64_t block_size, int64_t expert_capacity) {
  check(logits.dim() == 2 && logits.size(1) > 0, "logits: expected shape (T, E), got ", shape_text(logits));
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  check_tensor("logits", logits, ScalarType::Float, {tokens, experts});
  if (expert_bias) check_tensor("expert_bias", *expert_bias, ScalarType::Float, {experts});
  check(top_k >= 1 && top_k <= experts, "top_k: expected 1 to ", experts, ", got ", top_k);
  check(n_group >= 1 && experts % n_group == 0, "n_group: expected a divisor of ", experts, ", got ", n_group);
  check(topk_group >= 1 && topk_group <= n_group, "topk_group: expected 1 to ", n_group, ", got ", topk_group);
  check(topk_group == n_group || experts / n_group >= 2, "n_group: expected at least two experts per group, got ", n_group, " groups");
  check(block_size >= 0 && (block_size == 0 || tokens % block_size == 0), "block_size: expected 0 or a divisor of ", tokens, ", got ",
        block_size);
  check(block_size == 0 || (expert_capacity >= top_k && expert_capacity <= experts), "expert_capacity: expected ", top_k, " to ", experts,
        ", got ", expert_capacity);
  check(tokens * top_k <= INT32_MAX, "logits: expected at most 2^31 - 1 choices, got ", tokens * top_k);
  Tensor ids = torch::stable::new_empty(logits, {tokens, top_k}, ScalarType::Int);
  Tensor weights = torch::stable::new_empty(logits, {tokens, top_k});
  Tensor offsets = torch::stable::new_empty(logits, {experts + 1}, ScalarType::Int);
  Tensor permutation = torch::stable::new_empty(logits, {tokens * top_k}, ScalarType::Int);
  moe_routing_cpu(
      {tokens, experts, top_k, n_group, topk_group, block_size, expert_capacity, softmax, normalize, float(scale),
       logits.const_data_ptr<float>(), expert_bias ? expert_bias->const_data_ptr<float>() : nullptr, ids.mutable_data_ptr<int32_t>(),
       weights.mutable_data_ptr<float>(), offsets.mutable_data_ptr<int32_t>(), permutation.mutable_data_ptr<int32_t>()},
      torch_threads());
  return {weights, ids, offsets, permutation};
}

Tensor moe_routing_backward(const Tensor& grad_weights, const Tensor& logits, const Tensor& topk_ids, double scale, bool softmax,
                            bool normalize) {
  check(logits.dim() == 2 && logits.size(1) > 0, "logits: expected shape (T, E), got ", shape_text(logits));
  check(topk_ids.dim() == 2, "topk_ids: expected 2 dimensions, got shape ", shape_text(topk_ids));
  const int64_t tokens = logits.size(0), experts = logits.size(1), top_k = topk_ids.size(1);
  check_tensor("logits", logits, ScalarType::Float, {tokens, experts});
  check_tensor("topk_ids", topk_ids, ScalarType::Int, {tokens, top_k});
  check_tensor("grad_weights", grad_weights, ScalarType::Float, {tokens, top_k});
  const int32_t* ids = topk_ids.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < tokens * top_k; ++i)
    check(ids[i] >= 0 && ids[i] < experts, "topk_ids: expected values in [0, ", experts, "), got ", ids[i]);
  Tensor grad_logits = torch::stable::empty_like(logits);
  moe_routing_backward_cpu({tokens, experts, top_k, softmax, normalize, float(scale), grad_weights.const_data_ptr<float>(),
                            logits.const_data_ptr<float>(), ids, grad_logits.mutable_data_ptr<float>()},
                           torch_threads());
  return grad_logits;
}

}  // namespace
}  // namespace llada

STABLE_TORCH_LIBRARY_IMPL(llada_kernels, CPU, m) {
  m.impl("moe_routing", TORCH_BOX(&llada::moe_routing));
  m.impl("moe_routing_backward", TORCH_BOX(&llada::moe_routing_backward));
}
