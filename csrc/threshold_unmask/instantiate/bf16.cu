#include "threshold_unmask/cuda_threshold_unmask.cuh"

namespace llada::cuda {

int threshold_unmask_bf16(const ThresholdUnmaskParams& p, void* workspace, void* stream) {
  return launch_threshold_unmask<bf16>(p, workspace, stream);
}

}  // namespace llada::cuda
