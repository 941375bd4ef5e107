#include "rms_norm/params.h"

#include <optional>

#include "bindings/launch.h"

namespace llada {
namespace {

std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, std::optional<Tensor> residual) {
  check(x.dim() == 2, "x: expected 2 dimensions, got shape ", shape_text(x));
  const int64_t rows = x.size(0), width = x.size(1);
  const bool is_bf16 = check_float_dtype("x", x);
  const Beside beside{"x", x};
  check_tensor("x", x, x.scalar_type(), {rows, width}, &beside);
  check_tensor("weight", weight, x.scalar_type(), {width}, &beside);
  if (residual) check_tensor("residual", *residual, x.scalar_type(), {rows, width}, &beside);
  Tensor y = empty_beside(x);
  Tensor total = residual ? empty_beside(x) : empty_beside(x, {0});
  Tensor rstd = empty_beside(x, {rows}, ScalarType::Float);
  const RmsNormParams p{is_bf16,
                        rows,
                        width,
                        float(eps),
                        x.const_data_ptr(),
                        weight.const_data_ptr(),
                        residual ? residual->const_data_ptr() : nullptr,
                        y.mutable_data_ptr(),
                        total.mutable_data_ptr(),
                        rstd.mutable_data_ptr<float>()};
  run_kernel(
      "rms_norm", x, 0, [&](const Parallel& threads) { rms_norm_cpu(p, threads); },
      [&](void* workspace, void* stream) { return rms_norm_cuda(p, workspace, stream); });
  return {y, total, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y, std::optional<Tensor> grad_total, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd) {
  check(x.dim() == 2, "x: expected 2 dimensions, got shape ", shape_text(x));
  const int64_t rows = x.size(0), width = x.size(1);
  const bool is_bf16 = check_float_dtype("x", x);
  const Beside beside{"x", x};
  check_tensor("x", x, x.scalar_type(), {rows, width}, &beside);
  check_tensor("grad_y", grad_y, x.scalar_type(), {rows, width}, &beside);
  if (grad_total) check_tensor("grad_total", *grad_total, x.scalar_type(), {rows, width}, &beside);
  check_tensor("weight", weight, x.scalar_type(), {width}, &beside);
  check_tensor("rstd", rstd, ScalarType::Float, {rows}, &beside);
  Tensor grad_x = empty_beside(x);
  Tensor grad_weight = empty_beside(x, {width}, ScalarType::Float);
  const RmsNormBackwardParams p{is_bf16,
                                rows,
                                width,
                                grad_y.const_data_ptr(),
                                grad_total ? grad_total->const_data_ptr() : nullptr,
                                x.const_data_ptr(),
                                weight.const_data_ptr(),
                                rstd.const_data_ptr<float>(),
                                grad_x.mutable_data_ptr(),
                                grad_weight.mutable_data_ptr<float>()};
  run_kernel(
      "rms_norm_backward", x, rms_norm_backward_workspace(p), [&](const Parallel& threads) { rms_norm_backward_cpu(p, threads); },
      [&](void* workspace, void* stream) { return rms_norm_backward_cuda(p, workspace, stream); });
  return {grad_x, grad_weight};
}

void implement(Library& m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace
}  // namespace llada

LLADA_REGISTER_CPU_AND_CUDA(llada::implement)
