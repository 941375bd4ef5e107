#include "rms_norm/cuda_rms_norm.cuh"

namespace llada::cuda {

int rms_norm_fp32(const RmsNormParams& p, void*, void* stream) { return launch_rms_norm<float>(p, stream); }

int rms_norm_backward_fp32(const RmsNormBackwardParams& p, void* workspace, void* stream) {
  return launch_rms_norm_backward<float>(p, workspace, stream);
}

}  // namespace llada::cuda
