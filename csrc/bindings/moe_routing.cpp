#include "moe_routing/params.h"

#include "bindings/launch.h"

#include <optional>

namespace llada {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_routing(const Tensor& logits, std::optional<Tensor> expert_bias, int64_t top_k,
                                                       int64_t n_group, int64_t topk_group, double scale, bool softmax, bool normalize,
                                                       int64_t block_size, int64_t expert_capacity) {
  check(logits.dim() == 2 && logits.size(1) > 0, "logits: expected shape (T, E), got ", shape_text(logits));
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const Beside beside{"logits", logits};
  check_tensor("logits", logits, ScalarType::Float, {tokens, experts}, &beside);
  if (expert_bias) check_tensor("expert_bias", *expert_bias, ScalarType::Float, {experts}, &beside);
  check(top_k >= 1 && top_k <= experts, "top_k: expected 1 to ", experts, ", got ", top_k);
  check(n_group >= 1 && experts % n_group == 0, "n_group: expected a divisor of ", experts, ", got ", n_group);
  check(topk_group >= 1 && topk_group <= n_group, "topk_group: expected 1 to ", n_group, ", got ", topk_group);
  check(topk_group == n_group || experts / n_group >= 2, "n_group: expected at least two experts per group, got ", n_group, " groups");
  check(block_size >= 0 && (block_size == 0 || tokens % block_size == 0), "block_size: expected 0 or a divisor of ", tokens, ", got ",
        block_size);
  check(block_size == 0 || (expert_capacity >= top_k && expert_capacity <= experts), "expert_capacity: expected ", top_k, " to ", experts,
        ", got ", expert_capacity);
  check(tokens * top_k <= INT32_MAX, "logits: expected at most 2^31 - 1 choices, got ", tokens * top_k);
  Tensor ids = empty_beside(logits, {tokens, top_k}, ScalarType::Int);
  Tensor weights = empty_beside(logits, {tokens, top_k});
  Tensor offsets = empty_beside(logits, {experts + 1}, ScalarType::Int);
  Tensor permutation = empty_beside(logits, {tokens * top_k}, ScalarType::Int);
  const MoeRoutingParams p{tokens,
                           experts,
                           top_k,
                           n_group,
                           topk_group,
                           block_size,
                           expert_capacity,
                           softmax,
                           normalize,
                           float(scale),
                           logits.const_data_ptr<float>(),
                           expert_bias ? expert_bias->const_data_ptr<float>() : nullptr,
                           ids.mutable_data_ptr<int32_t>(),
                           weights.mutable_data_ptr<float>(),
                           offsets.mutable_data_ptr<int32_t>(),
                           permutation.mutable_data_ptr<int32_t>()};
  check(!on_cuda(logits) || moe_routing_fits_cuda(p), "logits: expected at most 1500 experts and groups together on a GPU, got ",
        experts + n_group);
  run_kernel(
      "moe_routing", logits, moe_routing_workspace(p), [&](const Parallel& threads) { moe_routing_cpu(p, threads); },
      [&](void* workspace, void* stream) { return moe_routing_cuda(p, workspace, stream); });
  return {weights, ids, offsets, permutation};
}

Tensor moe_routing_backward(const Tensor& grad_weights, const Tensor& logits, const Tensor& topk_ids, double scale, bool softmax,
                            bool normalize) {
  check(logits.dim() == 2 && logits.size(1) > 0, "logits: expected shape (T, E), got ", shape_text(logits));
  check(topk_ids.dim() == 2, "topk_ids: expected 2 dimensions, got shape ", shape_text(topk_ids));
  const int64_t tokens = logits.size(0), experts = logits.size(1), top_k = topk_ids.size(1);
  const Beside beside{"logits", logits};
  check_tensor("logits", logits, ScalarType::Float, {tokens, experts}, &beside);
  check_tensor("topk_ids", topk_ids, ScalarType::Int, {tokens, top_k}, &beside);
  check_tensor("grad_weights", grad_weights, ScalarType::Float, {tokens, top_k}, &beside);
  const int32_t* ids = topk_ids.const_data_ptr<int32_t>();
  for (int64_t i = 0; !on_cuda(logits) && i < tokens * top_k; ++i)  // a GPU takes the score of an id out of range for 0
    check(ids[i] >= 0 && ids[i] < experts, "topk_ids: expected values in [0, ", experts, "), got ", ids[i]);
  Tensor grad_logits = empty_beside(logits);
  const MoeRoutingBackwardParams p{tokens,
                                   experts,
                                   top_k,
                                   softmax,
                                   normalize,
                                   float(scale),
                                   grad_weights.const_data_ptr<float>(),
                                   logits.const_data_ptr<float>(),
                                   ids,
                                   grad_logits.mutable_data_ptr<float>()};
  run_kernel(
      "moe_routing_backward", logits, 0, [&](const Parallel& threads) { moe_routing_backward_cpu(p, threads); },
      [&](void* workspace, void* stream) { return moe_routing_backward_cuda(p, workspace, stream); });
  return grad_logits;
}

void implement(Library& m) {
  m.impl("moe_routing", TORCH_BOX(&moe_routing));
  m.impl("moe_routing_backward", TORCH_BOX(&moe_routing_backward));
}

}  // namespace
}  // namespace llada

LLADA_REGISTER_CPU_AND_CUDA(llada::implement)
