#pragma once

#include "common/cpu_level.h"

namespace llada {

// Attention of packed new tokens over the pages of their row and the new keys. All contiguous; the cache is read in place.
struct CachedBlockAttentionParams {
  bool bf16;  // else fp32
  int64_t heads, kv_heads, head_dim;
  float scale;
  const void *q, *k_new, *v_new;  // [T, heads, head_dim], 2 x [T, kv_heads, head_dim]
  const void *cache_k, *cache_v;  // [pages, page_size, kv_heads, head_dim]
  int64_t page_size, max_pages;
  const int32_t* page_table;            // [R, max_pages]
  const int32_t* own;                   // [T, 2]: half-open intervals of new keys
  const int32_t *tiles, *order, *rows;  // [num_tiles, 7], [num_tiles], [num_tiles]: a tile's context is that of its row
  int64_t num_tiles, max_tile_queries;
  void* out;  // [T, heads, head_dim]
};

LLADA_DECLARE_CPU_MATRIX_KERNEL(cached_block_attention, CachedBlockAttentionParams)

}  // namespace llada
