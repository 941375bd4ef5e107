#include "rope/params.h"

#include <optional>

#include "bindings/launch.h"

namespace llada {
namespace {

using Optional = std::optional<Tensor>;

// Views of a larger product are taken as they are: only a token's heads and dims must be contiguous.
void check_heads(const char* name, const Tensor& x, const Tensor& q, int64_t dim) {
  check(x.is_cpu() == q.is_cpu() && x.get_device_index() == q.get_device_index(), name, ": expected the device of the queries");
  check(x.scalar_type() == q.scalar_type(), name, ": expected dtype ", torch::headeronly::toString(q.scalar_type()), ", got ",
        torch::headeronly::toString(x.scalar_type()));
  check(x.dim() == 3 && x.size(2) == dim, name, ": expected shape (*, *, ", dim, "), got ", shape_text(x));
  const bool together = x.numel() == 0 || ((x.stride(2) == 1 || dim == 1) && (x.stride(1) == dim || x.size(1) == 1));
  check(together, name, ": expected the heads of a token to be contiguous");
}

// What forward and backward have in common: `x` and `x_k` are the inputs or the gradients.
RopeParams common(const char* name, const Tensor& x, const char* name_k, const Optional& x_k, const Tensor& cos, const Tensor& sin,
                  const Optional& q_weight, const Optional& k_weight) {
  check(x.dim() == 3, name, ": expected 3 dimensions, got shape ", shape_text(x));
  check(cos.dim() == 2, "cos: expected 2 dimensions, got shape ", shape_text(cos));
  const int64_t dim = x.size(2), rotary = cos.size(1), tokens = x_k ? x_k->size(0) : x.size(0);
  RopeParams p{};
  p.bf16 = check_float_dtype(name, x);
  p.dim = dim, p.rotary = rotary;
  check(rotary % 2 == 0 && rotary <= dim, "cos: expected an even number of columns, at most ", dim, ", got ", rotary);
  const Beside beside{name, x};
  check_heads(name, x, x, dim);
  check(!on_cuda(x) || dim <= 480, name, ": expected a head dim of at most 480 on a GPU, got ", dim);
  if (x_k) check_heads(name_k, *x_k, x, dim);
  check(x.size(0) <= tokens, name, ": expected at most ", tokens, " tokens (those of ", name_k, "), got ", x.size(0));
  check_tensor("cos", cos, x.scalar_type(), {tokens, rotary}, &beside);
  check_tensor("sin", sin, x.scalar_type(), {tokens, rotary}, &beside);
  check((q_weight && x_k) == k_weight.has_value(), "k_weight: expected one with q_weight and ", name_k, ", none otherwise");
  if (q_weight) check_tensor("q_weight", *q_weight, x.scalar_type(), {dim}, &beside);
  if (k_weight) check_tensor("k_weight", *k_weight, x.scalar_type(), {dim}, &beside);
  p.cos = cos.const_data_ptr(), p.sin = sin.const_data_ptr();
  p.q.tokens = x.size(0), p.q.heads = x.size(1), p.q.stride = x.stride(0), p.q.x = x.const_data_ptr();
  if (x_k) p.k.tokens = x_k->size(0), p.k.heads = x_k->size(1), p.k.stride = x_k->stride(0), p.k.x = x_k->const_data_ptr();
  if (q_weight) p.q.weight = q_weight->const_data_ptr();
  if (k_weight) p.k.weight = k_weight->const_data_ptr();
  return p;
}

void run_rope(const char* op, const Tensor& x, const RopeParams& p) {
  run_kernel(
      op, x, rope_workspace(p), [&](const Parallel& threads) { rope_cpu(p, threads); },
      [&](void* workspace, void* stream) { return rope_cuda(p, workspace, stream); });
}

std::tuple<Tensor, Tensor, Tensor> rope(const Tensor& q, Optional k, const Tensor& cos, const Tensor& sin, Optional q_weight,
                                        Optional k_weight, double eps) {
  RopeParams p = common("q", q, "k", k, cos, sin, q_weight, k_weight);
  p.eps = float(eps);
  Tensor q_out = empty_beside(q), k_out = k ? empty_beside(*k) : empty_beside(q, {0});
  const int64_t q_rows = p.q.tokens * p.q.heads, k_rows = p.k.tokens * p.k.heads;
  Tensor rstd = empty_beside(q, {q_weight ? q_rows + k_rows : 0}, ScalarType::Float);
  p.q.y = q_out.mutable_data_ptr(), p.k.y = k_out.mutable_data_ptr();
  p.q.rstd = rstd.mutable_data_ptr<float>(), p.k.rstd = p.q.rstd + q_rows;
  run_rope("rope", q, p);
  return {q_out, k_out, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rope_backward(const Tensor& grad_q, Optional grad_k, Optional q, Optional k, const Tensor& cos,
                                                         const Tensor& sin, Optional q_weight, Optional k_weight, const Tensor& rstd) {
  RopeParams p = common("grad_q", grad_q, "grad_k", grad_k, cos, sin, q_weight, k_weight);
  p.transposed = true;
  const int64_t q_rows = p.q.tokens * p.q.heads, k_rows = p.k.tokens * p.k.heads;
  Tensor out_q = empty_beside(grad_q), out_k = grad_k ? empty_beside(*grad_k) : empty_beside(grad_q, {0});
  Tensor grad_q_weight = empty_beside(grad_q, {q_weight ? p.dim : 0}, ScalarType::Float);
  Tensor grad_k_weight = empty_beside(grad_q, {k_weight ? p.dim : 0}, ScalarType::Float);
  p.q.y = out_q.mutable_data_ptr(), p.k.y = out_k.mutable_data_ptr();
  if (q_weight) {
    const Beside beside{"grad_q", grad_q};
    check_tensor("rstd", rstd, ScalarType::Float, {q_rows + k_rows}, &beside);
    p.q.rstd = const_cast<float*>(rstd.const_data_ptr<float>()), p.k.rstd = p.q.rstd + q_rows;
    p.q.grad_weight = grad_q_weight.mutable_data_ptr<float>(), p.k.grad_weight = grad_k_weight.mutable_data_ptr<float>();
    const auto input = [&](const char* name, const Optional& x, const Tensor& grad, RopeHeads& heads) {
      check(x.has_value(), name, ": expected a tensor together with weights");
      check_heads(name, *x, grad, p.dim);
      check(x->size(0) == heads.tokens && x->size(1) == heads.heads, name, ": expected shape ", shape_text(grad), ", got ", shape_text(*x));
      heads.input = x->const_data_ptr(), heads.input_stride = x->stride(0);
    };
    input("q", q, grad_q, p.q);
    if (grad_k) input("k", k, *grad_k, p.k);
  }
  run_rope("rope_backward", grad_q, p);
  return {out_q, out_k, grad_q_weight, grad_k_weight};
}

void implement(Library& m) {
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_backward", TORCH_BOX(&rope_backward));
}

}  // namespace
}  // namespace llada

LLADA_REGISTER_CPU_AND_CUDA(llada::implement)
