// Emulated kernels raise what went wrong in the emulation.
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

#include "common/cuda.h"
#include "common/cuda_kernel.h"

namespace llada {

const char* cuda_error_text(int) { return emulation::last_error(); }

}  // namespace llada

namespace {

void set_order(int64_t order) { emulation::set_order(int(order)); }

void fail_next() { emulation::fail_next(); }

// Kernels with a fault each, for the tests of the emulation itself.
void faulty(int fault) {
  using namespace llada::cuda;
  if (fault == 1 && threadIdx.x < 40) __syncthreads();
  if (fault == 2 && threadIdx.x % 2 == 0) __shfl_xor_sync(kAllLanes, 1, 1);
  if (fault == 3) dynamic_shared<char>()[threadIdx.x + 1] = 1;
  if (fault == 4) load_pack<4>(dynamic_shared<char>() + 1);
  __syncthreads();
}

void fault(std::string name) {
  const char* names[] = {"none", "barrier", "shuffle", "bounds", "alignment"};
  int kind = 0;
  while (kind < 4 && name != names[kind]) ++kind;
  if (llada::cuda::launch(faulty, 2, 64, 64, nullptr, kind) != 0) throw std::runtime_error(emulation::last_error());
}

void last_writer(int64_t* out) { *out = threadIdx.x; }

int64_t race() {
  int64_t out = -1;
  llada::cuda::launch(last_writer, 1, 64, 0, nullptr, &out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llada_kernels_emulated, m) {
  m.def("set_order(int order) -> ()");
  m.def("fail_next() -> ()");
  m.def("fault(str name) -> ()");
  m.def("race() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(llada_kernels_emulated, CompositeExplicitAutograd, m) {
  m.impl("set_order", TORCH_BOX(&set_order));
  m.impl("fail_next", TORCH_BOX(&fail_next));
  m.impl("fault", TORCH_BOX(&fault));
  m.impl("race", TORCH_BOX(&race));
}
