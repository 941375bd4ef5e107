#include <cuda_runtime.h>

#include "common/cuda_kernel.h"

namespace llada {

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace llada
