#include "bindings/tensor_checks.h"

namespace llada {
namespace {

std::string current_cpu_level() {
  check(cpu_level_error() == nullptr, cpu_level_error() ? cpu_level_error() : "");
  return cpu_level_name(cpu_level());
}

}  // namespace
}  // namespace llada

STABLE_TORCH_LIBRARY_IMPL(llada_kernels, CompositeExplicitAutograd, m) { m.impl("cpu_level", TORCH_BOX(&llada::current_cpu_level)); }
