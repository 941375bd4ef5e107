#include "bindings/launch.h"

namespace llada {
namespace {

// For which GPUs CUDA kernels were built; empty: none were.
std::string cuda_architectures() {
#ifdef LLADA_CUDA
  return LLADA_CUDA_ARCHITECTURES;
#else
  return "";
#endif
}

}  // namespace
}  // namespace llada

LLADA_LIBRARY_IMPL(LLADA_LIBRARY, CompositeExplicitAutograd, m) { m.impl("cuda_architectures", TORCH_BOX(&llada::cuda_architectures)); }
