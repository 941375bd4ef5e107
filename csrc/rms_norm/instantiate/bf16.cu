#include "rms_norm/cuda_rms_norm.cuh"

namespace llada::cuda {

int rms_norm_bf16(const RmsNormParams& p, void*, void* stream) { return launch_rms_norm<bf16>(p, stream); }

int rms_norm_backward_bf16(const RmsNormBackwardParams& p, void* workspace, void* stream) {
  return launch_rms_norm_backward<bf16>(p, workspace, stream);
}

}  // namespace llada::cuda
