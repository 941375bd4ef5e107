// Large results in large pages: the kernel hands out fresh memory 4 KB at a time otherwise.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bindings/tensor_checks.h"

namespace llada {

// Asks for 2 MB pages for a new tensor that is not written yet (where the system leaves the choice to programs). The weight gradients of a
// mini layer are 1.6 GB: 400,000 page faults took longer than computing them.
inline Tensor in_huge_pages(Tensor x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr()), end = begin + uintptr_t(x.numel()) * x.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // only advice: failing is harmless
#endif
  return x;
}

}  // namespace llada
