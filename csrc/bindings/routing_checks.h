// Checks of sorted rows: kernels index memory with these numbers, so every one is checked.
#pragma once

#include "bindings/tensor_checks.h"

namespace llada {

inline void check_offsets(const Tensor& offsets, int64_t experts, int64_t rows) {
  check_tensor("offsets", offsets, ScalarType::Int, {experts + 1});
  const int32_t* values = offsets.const_data_ptr<int32_t>();
  check(values[0] == 0 && values[experts] == rows, "offsets: expected to start at 0 and end at ", rows, " (the number of rows), got ",
        values[0], " and ", values[experts]);
  for (int64_t e = 0; e < experts; ++e)
    check(values[e] <= values[e + 1], "offsets: expected rising values, got ", values[e], " before ", values[e + 1], " at index ", e + 1);
}

inline void check_permutation(const Tensor& permutation, int64_t count) {
  check_tensor("permutation", permutation, ScalarType::Int, {count});
  const int32_t* values = permutation.const_data_ptr<int32_t>();
  std::vector<bool> seen(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const bool good = values[i] >= 0 && values[i] < count && !seen[static_cast<size_t>(values[i])];
    check(good, "permutation: expected each of 0 to ", count - 1, " once, got ", values[i], " at index ", i);
    seen[static_cast<size_t>(values[i])] = true;
  }
}

}  // namespace llada
