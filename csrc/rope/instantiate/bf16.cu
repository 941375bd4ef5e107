#include "rope/cuda_rope.cuh"

namespace llada::cuda {

int rope_bf16(const RopeParams& p, void* workspace, void* stream) { return launch_rope<bf16>(p, workspace, stream); }

}  // namespace llada::cuda
