// Between tensors and the params structs of kernels: checks whose messages name the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "common/cpu_level.h"
#include "common/huge_pages.h"
#include "common/parallel.h"

namespace llada {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A shape as text, made when it is printed.
struct ShapeText {
  const Tensor& x;
};

inline ShapeText shape_text(const Tensor& x) { return {x}; }

inline std::ostream& operator<<(std::ostream& out, const ShapeText& shape) {
  out << "(";
  for (int64_t i = 0; i < shape.x.dim(); ++i) out << (i ? ", " : "") << shape.x.size(i);
  return out << ")";
}

// What is expected of one: -1 stands for any size.
inline std::ostream& operator<<(std::ostream& out, const std::initializer_list<int64_t>& shape) {
  out << "(";
  const char* between = "";
  for (int64_t size : shape) {
    out << between;
    size < 0 ? out << "*" : out << size;
    between = ", ";
  }
  return out << ")";
}

// std::invalid_argument arrives in Python as ValueError with this text (STD_TORCH_CHECK would add file and line). Apart from the checks,
// which are on the way of every call.
template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
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
  check(same, name, ": expected shape ", shape, ", got ", shape_text(x));
  check(x.is_contiguous(), name, ": expected a contiguous tensor");
}

// fp32 or bf16: returns whether it is bf16.
inline bool check_float_dtype(const char* name, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name, ": expected dtype Float or BFloat16, got ",
        torch::headeronly::toString(dtype));
  return dtype == ScalarType::BFloat16;
}

// An uninitialised contiguous tensor beside `x`. torch::stable::empty_like looks an operator up by its name at every call, and three
// results took 2 of the 6 us of a small call so, 20 of 53 where nothing of it was in a cache.
inline Tensor empty_beside(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  constexpr size_t kMaxDims = 8;
  check(shape.size() <= kMaxDims, "shape: expected at most ", kMaxDims, " dimensions, got ", shape.size());
  int64_t strides[kMaxDims], stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(shape[i], 1)) strides[i] = stride;
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides,
                                                         torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                                                         device_type, x.get_device_index(), &result));
  const Tensor y(result);
  // Fresh memory comes 4 KB at a time otherwise: rms_norm of 4096 x 2048 fp32 took 14 ms instead of 4.
  constexpr int64_t kLarge = int64_t(1) << 20;  // elements
  if (stride >= kLarge && x.is_cpu()) advise_huge_pages(y.mutable_data_ptr(), size_t(y.numel()) * y.element_size());
  return y;
}

inline Tensor empty_beside(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  return empty_beside(x, shape, x.scalar_type());
}

inline Tensor empty_beside(const Tensor& x) { return empty_beside(x, x.sizes()); }

// torch's own pool; also the place where a wrong LLADA_KERNELS_CPU is reported.
inline Parallel torch_threads() {
  check(cpu_level_error() == nullptr, cpu_level_error() ? cpu_level_error() : "");
  auto run = [](int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
    torch::stable::parallel_for(begin, end, grain, [=](int64_t b, int64_t e) { body(b, e, context); });
  };
  return Parallel(run, torch::stable::get_num_threads());
}

}  // namespace llada
