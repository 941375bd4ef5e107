#include "moe_mlp/params.h"

#include "bindings/routing_checks.h"

namespace llada {
namespace {

struct Sizes {
  bool bf16;
  int64_t tokens, top_k, experts, hidden, width;
};

Sizes check_arguments(const Tensor& x, const Tensor& topk_weights, const Tensor& offsets, const Tensor& permutation,
                      const Tensor& w_gate_up, const Tensor& w_down) {
  check(x.dim() == 2, "x: expected 2 dimensions, got shape ", shape_text(x));
  check(topk_weights.dim() == 2 && topk_weights.size(1) > 0, "topk_weights: expected shape (T, K), got ", shape_text(topk_weights));
  check(w_down.dim() == 3, "w_down: expected 3 dimensions, got shape ", shape_text(w_down));
  const Sizes s = {check_float_dtype("x", x), x.size(0), topk_weights.size(1), w_down.size(0), x.size(1), w_down.size(2)};
  check_tensor("x", x, x.scalar_type(), {s.tokens, s.hidden});
  check_tensor("topk_weights", topk_weights, ScalarType::Float, {s.tokens, s.top_k});
  check_tensor("w_gate_up", w_gate_up, x.scalar_type(), {s.experts, 2 * s.width, s.hidden});
  check_tensor("w_down", w_down, x.scalar_type(), {s.experts, s.hidden, s.width});
  check_offsets(offsets, s.experts, s.tokens * s.top_k);
  check_permutation(permutation, s.tokens * s.top_k);
  return s;
}

// pre_activation is empty (0 rows) unless `save`: inference needs none.
std::tuple<Tensor, Tensor> moe_mlp(const Tensor& x, const Tensor& topk_weights, const Tensor& offsets, const Tensor& permutation,
                                   const Tensor& w_gate_up, const Tensor& w_down, bool save) {
  const Sizes s = check_arguments(x, topk_weights, offsets, permutation, w_gate_up, w_down);
  Tensor out = torch::stable::empty_like(x);
  Tensor pre_activation = torch::stable::new_empty(x, {save ? s.tokens * s.top_k : 0, 2 * s.width});
  moe_mlp_cpu({s.bf16, s.tokens, s.top_k, s.experts, s.hidden, s.width, x.const_data_ptr(), topk_weights.const_data_ptr<float>(),
               offsets.const_data_ptr<int32_t>(), permutation.const_data_ptr<int32_t>(), w_gate_up.const_data_ptr(),
               w_down.const_data_ptr(), out.mutable_data_ptr(), save ? pre_activation.mutable_data_ptr() : nullptr},
              torch_threads());
  return {out, pre_activation};
}

// Gradients that are not needed come back empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> moe_mlp_backward(const Tensor& grad_out, const Tensor& x, const Tensor& topk_weights,
                                                            const Tensor& offsets, const Tensor& permutation, const Tensor& w_gate_up,
                                                            const Tensor& w_down, const Tensor& pre_activation, bool need_x,
                                                            bool need_w_gate_up, bool need_w_down) {
  const Sizes s = check_arguments(x, topk_weights, offsets, permutation, w_gate_up, w_down);
  check_tensor("grad_out", grad_out, x.scalar_type(), {s.tokens, s.hidden});
  check_tensor("pre_activation", pre_activation, x.scalar_type(), {s.tokens * s.top_k, 2 * s.width});
  const auto wanted = [](const Tensor& like, bool need) {
    return need ? torch::stable::empty_like(like) : torch::stable::new_empty(like, {0});
  };
  Tensor grad_x = wanted(x, need_x), grad_w_gate_up = wanted(w_gate_up, need_w_gate_up), grad_w_down = wanted(w_down, need_w_down);
  Tensor grad_weights = torch::stable::empty_like(topk_weights);
  moe_mlp_backward_cpu(
      {s.bf16, s.tokens, s.top_k, s.experts, s.hidden, s.width, grad_out.const_data_ptr(), x.const_data_ptr(),
       topk_weights.const_data_ptr<float>(), offsets.const_data_ptr<int32_t>(), permutation.const_data_ptr<int32_t>(),
       w_gate_up.const_data_ptr(), w_down.const_data_ptr(), pre_activation.const_data_ptr(), grad_weights.mutable_data_ptr<float>(),
       need_x ? grad_x.mutable_data_ptr() : nullptr, need_w_gate_up ? grad_w_gate_up.mutable_data_ptr() : nullptr,
       need_w_down ? grad_w_down.mutable_data_ptr() : nullptr},
      torch_threads());
  return {grad_x, grad_weights, grad_w_gate_up, grad_w_down};
}

}  // namespace
}  // namespace llada

STABLE_TORCH_LIBRARY_IMPL(llada_kernels, CPU, m) {
  m.impl("moe_mlp", TORCH_BOX(&llada::moe_mlp));
  m.impl("moe_mlp_backward", TORCH_BOX(&llada::moe_mlp_backward));
}
