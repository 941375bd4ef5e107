// Large buffers in large pages: the system hands out fresh memory 4 KB at a time otherwise.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace llada {

// Asks for 2 MB pages for memory that is not written yet (where the system leaves the choice to programs). The weight gradients of a mini
// layer are 1.6 GB: 400,000 page faults took longer than computing them.
inline void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + bytes) / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // only advice: failing is harmless
#endif
}

}  // namespace llada
