#include "rope/cuda_rope.cuh"

namespace llada::cuda {

int rope_fp32(const RopeParams& p, void* workspace, void* stream) { return launch_rope<float>(p, workspace, stream); }

}  // namespace llada::cuda
