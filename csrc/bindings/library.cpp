// Every operator schema. Implementations register themselves in <op>.cpp.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(llada_kernels, m) {
  m.def("cpu_level() -> str");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def("rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor rstd) -> (Tensor grad_x, Tensor grad_weight)");
}
