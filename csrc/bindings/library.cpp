// Every operator schema. Implementations register themselves in <op>.cpp.
#include "bindings/launch.h"

LLADA_LIBRARY_DEFINITION(LLADA_LIBRARY, m) {
  m.def("cpu_level() -> str");
  m.def("cuda_architectures() -> str");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor y, Tensor total, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor grad_y, Tensor? grad_total, Tensor x, Tensor weight, Tensor rstd) "
      "-> (Tensor grad_x, Tensor grad_weight)");
  m.def(
      "rope(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, float eps) "
      "-> (Tensor q_out, Tensor k_out, Tensor rstd)");
  m.def(
      "rope_backward(Tensor grad_q, Tensor? grad_k, Tensor? q, Tensor? k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, "
      "Tensor rstd) -> (Tensor grad_q_in, Tensor grad_k_in, Tensor grad_q_weight, Tensor grad_k_weight)");
  m.def(
      "threshold_unmask(Tensor logits, Tensor tokens, int mask_token_id, Tensor threshold, Tensor? editing_threshold, "
      "Tensor min_unmask, Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? seed, Tensor? editable, Tensor? positions, "
      "Tensor? forward_index) -> (Tensor new_tokens, Tensor confidence, Tensor counts)");
  m.def(
      "lm_head_unmask(Tensor hidden, Tensor lm_head, Tensor tokens, int mask_token_id, Tensor threshold, Tensor? editing_threshold, "
      "Tensor min_unmask, Tensor? editable) -> (Tensor new_tokens, Tensor confidence, Tensor counts)");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor grad_y, Tensor gate_up) -> Tensor");
  m.def(
      "moe_routing(Tensor logits, Tensor? expert_bias, int top_k, int n_group, int topk_group, float scale, bool softmax, "
      "bool normalize, int block_size, int expert_capacity) -> (Tensor topk_weights, Tensor topk_ids, Tensor offsets, "
      "Tensor permutation)");
  m.def(
      "moe_routing_backward(Tensor grad_weights, Tensor logits, Tensor topk_ids, float scale, bool softmax, bool normalize) "
      "-> Tensor");
  m.def("grouped_gemm(Tensor a, Tensor b, Tensor offsets) -> Tensor");
  m.def(
      "grouped_gemm_backward(Tensor grad, Tensor a, Tensor b, Tensor offsets, bool need_a, bool need_b) "
      "-> (Tensor grad_a, Tensor grad_b)");
  m.def(
      "moe_mlp(Tensor x, Tensor topk_weights, Tensor offsets, Tensor permutation, Tensor w_gate_up, Tensor w_down, bool save) "
      "-> (Tensor out, Tensor pre_activation)");
  m.def(
      "moe_mlp_quantized(Tensor x, Tensor topk_weights, Tensor offsets, Tensor permutation, Tensor gate_up_data, "
      "Tensor gate_up_scales, Tensor down_data, Tensor down_scales) -> Tensor");
  m.def(
      "moe_mlp_backward(Tensor grad_out, Tensor x, Tensor topk_weights, Tensor offsets, Tensor permutation, Tensor w_gate_up, "
      "Tensor w_down, Tensor pre_activation, bool need_x, bool need_w_gate_up, bool need_w_down) "
      "-> (Tensor grad_x, Tensor grad_topk_weights, Tensor grad_w_gate_up, Tensor grad_w_down)");
  m.def(
      "block_attention(Tensor q, Tensor k, Tensor v, Tensor context, Tensor own, Tensor tiles, Tensor order, Tensor key_offsets, "
      "Tensor key_runs, Tensor key_order, int block_n, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "block_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor context, Tensor own, "
      "Tensor tiles, Tensor order, Tensor key_offsets, Tensor key_runs, Tensor key_order, int block_n, float scale) -> "
      "(Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "cached_block_attention(Tensor q, Tensor k_new, Tensor v_new, Tensor cache_k, Tensor cache_v, Tensor page_table, Tensor own, "
      "Tensor tiles, Tensor order, Tensor rows, float scale) -> Tensor");
  m.def(
      "lm_loss(Tensor hidden, Tensor lm_head, Tensor targets, Tensor weights, int entropy_of, float temperature) "
      "-> (Tensor loss, Tensor token_losses, Tensor entropy, Tensor correct, Tensor statistics)");
  m.def(
      "lm_loss_backward(Tensor grad_loss, Tensor grad_token_losses, Tensor grad_entropy, Tensor hidden, Tensor lm_head, "
      "Tensor targets, Tensor weights, Tensor correct, Tensor statistics, int entropy_of, float temperature, bool need_hidden, "
      "bool need_lm_head) -> (Tensor grad_hidden, Tensor grad_lm_head)");
}
