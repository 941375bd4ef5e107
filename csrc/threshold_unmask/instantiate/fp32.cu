#include "threshold_unmask/cuda_threshold_unmask.cuh"

namespace llada::cuda {

int threshold_unmask_fp32(const ThresholdUnmaskParams& p, void* workspace, void* stream) {
  return launch_threshold_unmask<float>(p, workspace, stream);
}

}  // namespace llada::cuda
