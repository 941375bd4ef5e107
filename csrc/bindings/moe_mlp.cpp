#include "moe_mlp/params.h"

#include "bindings/routing_checks.h"

namespace llada {
namespace {

struct Sizes {
  bool bf16;
  int64_t tokens, top_k, experts, hidden, width;
};

// All but the weights.
Sizes check_routing(const Tensor& x, const Tensor& topk_weights, const Tensor& offsets, const Tensor& permutation, int64_t experts,
                    int64_t width) {
  check(x.dim() == 2, "x: expected 2 dimensions, got shape ", shape_text(x));
  check(topk_weights.dim() == 2 && topk_weights.size(1) > 0, "topk_weights: expected shape (T, K), got ", shape_text(topk_weights));
  const Sizes s = {check_float_dtype("x", x), x.size(0), topk_weights.size(1), experts, x.size(1), width};
  check_tensor("x", x, x.scalar_type(), {s.tokens, s.hidden});
  check_tensor("topk_weights", topk_weights, ScalarType::Float, {s.tokens, s.top_k});
  check_offsets(offsets, s.experts, s.tokens * s.top_k);
  check_permutation(permutation, s.tokens * s.top_k);
  return s;
}

Sizes check_arguments(const Tensor& x, const Tensor& topk_weights, const Tensor& offsets, const Tensor& permutation,
                      const Tensor& w_gate_up, const Tensor& w_down) {
  check(w_down.dim() == 3, "w_down: expected 3 dimensions, got shape ", shape_text(w_down));
  const Sizes s = check_routing(x, topk_weights, offsets, permutation, w_down.size(0), w_down.size(2));
  check_tensor("w_gate_up", w_gate_up, x.scalar_type(), {s.experts, 2 * s.width, s.hidden});
  check_tensor("w_down", w_down, x.scalar_type(), {s.experts, s.hidden, s.width});
  return s;
}

// The kind follows from the dtype: int8 holds itself, uint8 two columns of int4.
ExpertWeights quantized(const char* data_name, const Tensor& data, const char* scales_name, const Tensor& scales, int64_t experts,
                        int64_t rows, int64_t columns) {
  const bool is_int4 = data.scalar_type() == ScalarType::Byte;
  check_tensor(data_name, data, is_int4 ? ScalarType::Byte : ScalarType::Char, {experts, rows, is_int4 ? columns / 2 : columns});
  check(scales.dim() == 3 && scales.size(2) > 0, scales_name, ": expected shape (E, N, K / group), got ", shape_text(scales));
  check_tensor(scales_name, scales, ScalarType::BFloat16, {experts, rows, -1});
  const int64_t group = columns / scales.size(2);
  check(group > 0 && group % 32 == 0 && group * scales.size(2) == columns, scales_name,
        ": expected groups of a multiple of 32 that divides ", columns, ", got ", scales.size(2), " groups");
  return {is_int4 ? ExpertWeights::Kind::int4 : ExpertWeights::Kind::int8, data.const_data_ptr(), scales.const_data_ptr(), group};
}

// pre_activation is empty (0 rows) unless `save`: inference needs none.
std::tuple<Tensor, Tensor> moe_mlp(const Tensor& x, const Tensor& topk_weights, const Tensor& offsets, const Tensor& permutation,
                                   const Tensor& w_gate_up, const Tensor& w_down, bool save) {
  const Sizes s = check_arguments(x, topk_weights, offsets, permutation, w_gate_up, w_down);
  Tensor out = empty_beside(x);
  Tensor pre_activation = empty_beside(x, {save ? s.tokens * s.top_k : 0, 2 * s.width});
  moe_mlp_cpu({s.bf16,
               s.tokens,
               s.top_k,
               s.experts,
               s.hidden,
               s.width,
               x.const_data_ptr(),
               topk_weights.const_data_ptr<float>(),
               offsets.const_data_ptr<int32_t>(),
               permutation.const_data_ptr<int32_t>(),
               {.data = w_gate_up.const_data_ptr()},
               {.data = w_down.const_data_ptr()},
               out.mutable_data_ptr(),
               save ? pre_activation.mutable_data_ptr() : nullptr},
              torch_threads());
  return {out, pre_activation};
}

// Inference with quantised experts, int8 [E, N, K] or int4 as uint8 [E, N, K / 2], scales bf16 [E, N, K / group].
Tensor moe_mlp_quantized(const Tensor& x, const Tensor& topk_weights, const Tensor& offsets, const Tensor& permutation,
                         const Tensor& gate_up_data, const Tensor& gate_up_scales, const Tensor& down_data, const Tensor& down_scales) {
  check(gate_up_data.dim() == 3, "gate_up_data: expected 3 dimensions, got shape ", shape_text(gate_up_data));
  const int64_t experts = gate_up_data.size(0), width = gate_up_data.size(1) / 2;
  const Sizes s = check_routing(x, topk_weights, offsets, permutation, experts, width);
  const ExpertWeights gate_up = quantized("gate_up_data", gate_up_data, "gate_up_scales", gate_up_scales, experts, 2 * width, s.hidden);
  const ExpertWeights down = quantized("down_data", down_data, "down_scales", down_scales, experts, s.hidden, width);
  Tensor out = empty_beside(x);
  moe_mlp_cpu({s.bf16, s.tokens, s.top_k, s.experts, s.hidden, s.width, x.const_data_ptr(), topk_weights.const_data_ptr<float>(),
               offsets.const_data_ptr<int32_t>(), permutation.const_data_ptr<int32_t>(), gate_up, down, out.mutable_data_ptr(), nullptr},
              torch_threads());
  return out;
}

// Gradients that are not needed come back empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> moe_mlp_backward(const Tensor& grad_out, const Tensor& x, const Tensor& topk_weights,
                                                            const Tensor& offsets, const Tensor& permutation, const Tensor& w_gate_up,
                                                            const Tensor& w_down, const Tensor& pre_activation, bool need_x,
                                                            bool need_w_gate_up, bool need_w_down) {
  const Sizes s = check_arguments(x, topk_weights, offsets, permutation, w_gate_up, w_down);
  check_tensor("grad_out", grad_out, x.scalar_type(), {s.tokens, s.hidden});
  check_tensor("pre_activation", pre_activation, x.scalar_type(), {s.tokens * s.top_k, 2 * s.width});
  const auto wanted = [](const Tensor& like, bool need) { return need ? empty_beside(like) : empty_beside(like, {0}); };
  Tensor grad_x = wanted(x, need_x), grad_w_gate_up = wanted(w_gate_up, need_w_gate_up), grad_w_down = wanted(w_down, need_w_down);
  Tensor grad_weights = empty_beside(topk_weights);
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
  m.impl("moe_mlp_quantized", TORCH_BOX(&llada::moe_mlp_quantized));
  m.impl("moe_mlp_backward", TORCH_BOX(&llada::moe_mlp_backward));
}
