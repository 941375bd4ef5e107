#include "rope/params.h"

#include "bindings/tensor_checks.h"

namespace llada {
namespace {

Tensor apply(const char* name, const Tensor& x, const Tensor& cos, const Tensor& sin, bool transposed) {
  check(x.dim() == 3, name, ": expected 3 dimensions, got shape ", shape_text(x));
  check(cos.dim() == 2, "cos: expected 2 dimensions, got shape ", shape_text(cos));
  const int64_t tokens = x.size(0), heads = x.size(1), dim = x.size(2), rotary = cos.size(1);
  const bool is_bf16 = check_float_dtype(name, x);
  check(rotary % 2 == 0 && rotary <= dim, "cos: expected an even number of columns, at most ", dim, ", got ", rotary);
  check_tensor(name, x, x.scalar_type(), {tokens, heads, dim});
  check_tensor("cos", cos, x.scalar_type(), {tokens, rotary});
  check_tensor("sin", sin, x.scalar_type(), {tokens, rotary});
  Tensor y = torch::stable::empty_like(x);
  rope_cpu({is_bf16, transposed, tokens, heads, dim, rotary, x.const_data_ptr(), cos.const_data_ptr(), sin.const_data_ptr(),
            y.mutable_data_ptr()},
           torch_threads());
  return y;
}

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin) { return apply("x", x, cos, sin, false); }

Tensor rope_backward(const Tensor& grad_y, const Tensor& cos, const Tensor& sin) { return apply("grad_y", grad_y, cos, sin, true); }

}  // namespace
}  // namespace llada

STABLE_TORCH_LIBRARY_IMPL(llada_kernels, CPU, m) {
  m.impl("rope", TORCH_BOX(&llada::rope));
  m.impl("rope_backward", TORCH_BOX(&llada::rope_backward));
}
