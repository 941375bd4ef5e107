#include "rms_norm/params.h"

#include <optional>

#include "bindings/tensor_checks.h"

namespace llada {
namespace {

std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, std::optional<Tensor> residual) {
  check(x.dim() == 2, "x: expected 2 dimensions, got shape ", shape_text(x));
  const int64_t rows = x.size(0), width = x.size(1);
  const bool is_bf16 = check_float_dtype("x", x);
  check_tensor("x", x, x.scalar_type(), {rows, width});
  check_tensor("weight", weight, x.scalar_type(), {width});
  if (residual) check_tensor("residual", *residual, x.scalar_type(), {rows, width});
  Tensor y = torch::stable::empty_like(x);
  Tensor total = residual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor rstd = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  rms_norm_cpu(
      {is_bf16, rows, width, float(eps), x.const_data_ptr(), weight.const_data_ptr(), residual ? residual->const_data_ptr() : nullptr,
       y.mutable_data_ptr(), total.mutable_data_ptr(), rstd.mutable_data_ptr<float>()},
      torch_threads());
  return {y, total, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y, std::optional<Tensor> grad_total, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd) {
  check(x.dim() == 2, "x: expected 2 dimensions, got shape ", shape_text(x));
  const int64_t rows = x.size(0), width = x.size(1);
  const bool is_bf16 = check_float_dtype("x", x);
  check_tensor("x", x, x.scalar_type(), {rows, width});
  check_tensor("grad_y", grad_y, x.scalar_type(), {rows, width});
  if (grad_total) check_tensor("grad_total", *grad_total, x.scalar_type(), {rows, width});
  check_tensor("weight", weight, x.scalar_type(), {width});
  check_tensor("rstd", rstd, ScalarType::Float, {rows});
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = torch::stable::new_empty(x, {width}, ScalarType::Float);
  rms_norm_backward_cpu(
      {is_bf16, rows, width, grad_y.const_data_ptr(), grad_total ? grad_total->const_data_ptr() : nullptr, x.const_data_ptr(),
       weight.const_data_ptr(), rstd.const_data_ptr<float>(), grad_x.mutable_data_ptr(), grad_weight.mutable_data_ptr<float>()},
      torch_threads());
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace llada

STABLE_TORCH_LIBRARY_IMPL(llada_kernels, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&llada::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&llada::rms_norm_backward));
}
