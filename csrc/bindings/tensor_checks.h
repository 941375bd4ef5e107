// Between tensors and the params structs of kernels: checks whose messages name the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "common/cpu_level.h"
#include "common/parallel.h"

namespace llada {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// std::invalid_argument arrives in Python as ValueError with this text (STD_TORCH_CHECK would add file and line).
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline std::string shape_text(const Tensor& x) {
  std::string text = "(";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + ")";
}

// The argument that decides on which device all the others must lie.
struct Beside {
  const char* name;
  const Tensor& x;
};

// -1 stands for any size. Kernels read raw memory, so every tensor is checked to be contiguous and on the CPU, or with `beside` on that
// device.
inline void check_tensor(const char* name, const Tensor& x, ScalarType dtype, std::initializer_list<int64_t> shape,
                         const Beside* beside = nullptr) {
  check(beside != nullptr || x.is_cpu(), name, ": expected a CPU tensor");
  check(beside == nullptr || (x.is_cpu() == beside->x.is_cpu() && x.get_device_index() == beside->x.get_device_index()), name,
        ": expected the device of ", beside == nullptr ? "" : beside->name);
  check(x.scalar_type() == dtype, name, ": expected dtype ", torch::headeronly::toString(dtype), ", got ",
        torch::headeronly::toString(x.scalar_type()));
  bool same = x.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) same = same && (size < 0 || x.size(i) == size), ++i;
  std::string expected = "(";
  i = 0;
  for (int64_t size : shape) expected += (i++ ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
  check(same, name, ": expected shape ", expected, "), got ", shape_text(x));
  check(x.is_contiguous(), name, ": expected a contiguous tensor");
}

// fp32 or bf16: returns whether it is bf16.
inline bool check_float_dtype(const char* name, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name, ": expected dtype Float or BFloat16, got ",
        torch::headeronly::toString(dtype));
  return dtype == ScalarType::BFloat16;
}

// torch's own pool; also the place where a wrong LLADA_KERNELS_CPU is reported.
inline Parallel torch_threads() {
  check(cpu_level_error() == nullptr, cpu_level_error() ? cpu_level_error() : "");
  auto run = [](int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
    torch::stable::parallel_for(begin, end, grain, [=](int64_t b, int64_t e) { body(b, e, context); });
  };
  return Parallel(run, torch::stable::get_num_threads());
}

}  // namespace llada
