// The rows of an expert in blocks: what the work items of grouped_gemm and moe_mlp are made of. No level-specific code.
#pragma once

#include <cstdint>
#include <vector>

namespace llada {

struct RowBlock {
  int64_t expert, begin, end;
};

// Blocks of at most `rows` rows. They depend on the offsets only, so results do not depend on the number of threads.
inline std::vector<RowBlock> row_blocks(const int32_t* offsets, int64_t experts, int64_t rows) {
  std::vector<RowBlock> blocks;
  for (int64_t e = 0; e < experts; ++e)
    for (int64_t r = offsets[e]; r < offsets[e + 1]; r += rows)
      blocks.push_back({e, r, r + rows < offsets[e + 1] ? r + rows : offsets[e + 1]});
  return blocks;
}

}  // namespace llada
