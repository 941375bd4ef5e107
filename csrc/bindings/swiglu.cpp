#include "swiglu/params.h"

#include "bindings/tensor_checks.h"

namespace llada {
namespace {

Tensor swiglu(const Tensor& gate_up) {
  check(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "gate_up: expected shape (*, an even number), got ", shape_text(gate_up));
  const bool is_bf16 = check_float_dtype("gate_up", gate_up);
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  check_tensor("gate_up", gate_up, gate_up.scalar_type(), {rows, 2 * width});
  Tensor y = empty_beside(gate_up, {rows, width});
  swiglu_cpu({is_bf16, rows, width, gate_up.const_data_ptr(), y.mutable_data_ptr()}, torch_threads());
  return y;
}

Tensor swiglu_backward(const Tensor& grad_y, const Tensor& gate_up) {
  check(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "gate_up: expected shape (*, an even number), got ", shape_text(gate_up));
  const bool is_bf16 = check_float_dtype("gate_up", gate_up);
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  check_tensor("gate_up", gate_up, gate_up.scalar_type(), {rows, 2 * width});
  check_tensor("grad_y", grad_y, gate_up.scalar_type(), {rows, width});
  Tensor grad_gate_up = empty_beside(gate_up);
  swiglu_backward_cpu({is_bf16, rows, width, grad_y.const_data_ptr(), gate_up.const_data_ptr(), grad_gate_up.mutable_data_ptr()},
                      torch_threads());
  return grad_gate_up;
}

}  // namespace
}  // namespace llada

STABLE_TORCH_LIBRARY_IMPL(llada_kernels, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&llada::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&llada::swiglu_backward));
}
