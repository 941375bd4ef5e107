#include "grouped_gemm/params.h"

#include "bindings/routing_checks.h"

namespace llada {
namespace {

Tensor grouped_gemm(const Tensor& a, const Tensor& b, const Tensor& offsets) {
  check(a.dim() == 2, "a: expected 2 dimensions, got shape ", shape_text(a));
  check(b.dim() == 3, "b: expected 3 dimensions, got shape ", shape_text(b));
  const int64_t rows = a.size(0), groups = b.size(0), n = b.size(1), k = a.size(1);
  const bool is_bf16 = check_float_dtype("a", a);
  check_tensor("a", a, a.scalar_type(), {rows, k});
  check_tensor("b", b, a.scalar_type(), {groups, n, k});
  check_offsets(offsets, groups, rows);
  Tensor out = empty_beside(a, {rows, n});
  grouped_gemm_cpu(
      {is_bf16, rows, groups, n, k, a.const_data_ptr(), b.const_data_ptr(), offsets.const_data_ptr<int32_t>(), out.mutable_data_ptr()},
      torch_threads());
  return out;
}

std::tuple<Tensor, Tensor> grouped_gemm_backward(const Tensor& grad, const Tensor& a, const Tensor& b, const Tensor& offsets, bool need_a,
                                                 bool need_b) {
  check(a.dim() == 2, "a: expected 2 dimensions, got shape ", shape_text(a));
  check(b.dim() == 3, "b: expected 3 dimensions, got shape ", shape_text(b));
  const int64_t rows = a.size(0), groups = b.size(0), n = b.size(1), k = a.size(1);
  const bool is_bf16 = check_float_dtype("a", a);
  check_tensor("grad", grad, a.scalar_type(), {rows, n});
  check_tensor("a", a, a.scalar_type(), {rows, k});
  check_tensor("b", b, a.scalar_type(), {groups, n, k});
  check_offsets(offsets, groups, rows);
  Tensor grad_a = need_a ? empty_beside(a) : empty_beside(a, {0});
  Tensor grad_b = need_b ? empty_beside(b) : empty_beside(b, {0});
  grouped_gemm_backward_cpu(
      {is_bf16, rows, groups, n, k, grad.const_data_ptr(), a.const_data_ptr(), b.const_data_ptr(), offsets.const_data_ptr<int32_t>(),
       need_a ? grad_a.mutable_data_ptr() : nullptr, need_b ? grad_b.mutable_data_ptr() : nullptr},
      torch_threads());
  return {grad_a, grad_b};
}

}  // namespace
}  // namespace llada

STABLE_TORCH_LIBRARY_IMPL(llada_kernels, CPU, m) {
  m.impl("grouped_gemm", TORCH_BOX(&llada::grouped_gemm));
  m.impl("grouped_gemm_backward", TORCH_BOX(&llada::grouped_gemm_backward));
}
