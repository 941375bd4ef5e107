#include "moe_routing/cuda_moe_routing.cuh"

namespace llada::cuda {

int moe_routing_fp32(const MoeRoutingParams& p, void* workspace, void* stream) { return launch_moe_routing(p, workspace, stream); }

int moe_routing_backward_fp32(const MoeRoutingBackwardParams& p, void*, void* stream) { return launch_moe_routing_backward(p, stream); }

}  // namespace llada::cuda
