// Between a binding and its kernels: one binding checks the arguments of both devices, and the tensors decide which kernels run.
#pragma once

#include <string>

#include "bindings/tensor_checks.h"
#include "common/cuda_kernel.h"

#ifdef LLADA_CUDA
#include <torch/csrc/stable/accelerator.h>

// Only a CUDA build of torch has it; the library must load beside any.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

// The tests build a second library from the same bindings, with emulated CUDA kernels for CPU tensors.
#ifndef LLADA_LIBRARY
#define LLADA_LIBRARY llada_kernels
#endif
#define LLADA_LIBRARY_IMPL(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)
#define LLADA_LIBRARY_DEFINITION(library, m) STABLE_TORCH_LIBRARY(library, m)

// `implement(m)` registers operators whose bindings end in run_kernel().
#if defined(LLADA_CUDA) && !defined(LLADA_CUDA_EMULATED)
#define LLADA_REGISTER_CPU_AND_CUDA(implement)                \
  LLADA_LIBRARY_IMPL(LLADA_LIBRARY, CPU, m) { implement(m); } \
  LLADA_LIBRARY_IMPL(LLADA_LIBRARY, CUDA, m) { implement(m); }
#else
#define LLADA_REGISTER_CPU_AND_CUDA(implement) \
  LLADA_LIBRARY_IMPL(LLADA_LIBRARY, CPU, m) { implement(m); }
#endif

namespace llada {

using Library = torch::stable::detail::StableLibrary;

inline bool on_cuda(const Tensor& x) {
#if defined(LLADA_CUDA_EMULATED)
  (void)x;
  return true;
#elif defined(LLADA_CUDA)
  return x.is_cuda();
#else
  (void)x;
  return false;
#endif
}

// cpu(threads) for tensors on a CPU; else cuda(workspace, stream), which returns a cudaError_t, with a workspace of that many bytes, on the
// current stream of x's device.
template <class Cpu, class Cuda>
void run_kernel(const char* op, const Tensor& x, int64_t workspace_bytes, Cpu&& cpu, Cuda&& cuda) {
  (void)op, (void)workspace_bytes, (void)cpu, (void)cuda;  // not all are used in each build
#ifndef LLADA_CUDA_EMULATED
  if (!on_cuda(x)) return cpu(torch_threads());
#endif
#ifdef LLADA_CUDA
  void* stream = nullptr;
#ifndef LLADA_CUDA_EMULATED
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (aoti_torch_get_current_cuda_stream == nullptr || aoti_torch_get_current_cuda_stream(device, &stream) != 0)
    throw std::runtime_error(std::string(op) + ": this torch gives no CUDA stream");
#endif
  Tensor workspace = empty_beside(x, {workspace_bytes}, ScalarType::Byte);
  const int error = cuda(workspace.mutable_data_ptr(), stream);
  if (error != 0) throw std::runtime_error(std::string(op) + ": CUDA error " + std::to_string(error) + ": " + cuda_error_text(error));
#endif
}

}  // namespace llada
