// Entry points of the CUDA kernels: plain functions, so that bindings see nothing of CUDA.
#pragma once

#include <cstdint>

// Declares op_bf16 and op_fp32 (csrc/<op>/instantiate/*.cu) and op_cuda(), which calls the one for the dtype. They enqueue work on `stream`
// with `workspace` of op_workspace(p) bytes and return a cudaError_t.
#ifdef LLADA_CUDA
#define LLADA_DECLARE_CUDA_KERNEL(op, Params)                                  \
  namespace cuda {                                                             \
  int op##_bf16(const Params&, void* workspace, void* stream);                 \
  int op##_fp32(const Params&, void* workspace, void* stream);                 \
  }                                                                            \
  inline int op##_cuda(const Params& p, void* workspace, void* stream) {       \
    return (p.bf16 ? cuda::op##_bf16 : cuda::op##_fp32)(p, workspace, stream); \
  }
// The same where all is fp32.
#define LLADA_DECLARE_FP32_CUDA_KERNEL(op, Params)             \
  namespace cuda {                                             \
  int op##_fp32(const Params&, void* workspace, void* stream); \
  }                                                            \
  inline int op##_cuda(const Params& p, void* workspace, void* stream) { return cuda::op##_fp32(p, workspace, stream); }
#else  // built without: never called, as nothing is registered for CUDA
#define LLADA_DECLARE_CUDA_KERNEL(op, Params) \
  inline int op##_cuda(const Params&, void*, void*) { return -1; }
#define LLADA_DECLARE_FP32_CUDA_KERNEL(op, Params) LLADA_DECLARE_CUDA_KERNEL(op, Params)
#endif

namespace llada {

const char* cuda_error_text(int error);

}  // namespace llada
