#include "cached_block_attention/params.h"

#include "bindings/attention_checks.h"

namespace llada {
namespace {

Tensor cached_block_attention(const Tensor& q, const Tensor& k_new, const Tensor& v_new, const Tensor& cache_k, const Tensor& cache_v,
                              const Tensor& page_table, const Tensor& own, const Tensor& tiles, const Tensor& order, const Tensor& rows,
                              double scale) {
  CachedBlockAttentionParams p{};
  p.bf16 = check_attention(q, "k_new", k_new, "v_new", v_new);
  const int64_t tokens = q.size(0);
  p.heads = q.size(1), p.kv_heads = k_new.size(1), p.head_dim = q.size(2);
  p.scale = float(scale);
  check_tensor("k_new", k_new, q.scalar_type(), {tokens, p.kv_heads, p.head_dim});
  check(cache_k.dim() == 4 && cache_k.size(1) > 0, "cache_k: expected shape (pages, page_size, ", p.kv_heads, ", ", p.head_dim, "), got ",
        shape_text(cache_k));
  const int64_t num_pages = cache_k.size(0);
  p.page_size = cache_k.size(1);
  check_tensor("cache_k", cache_k, q.scalar_type(), {num_pages, p.page_size, p.kv_heads, p.head_dim});
  check_tensor("cache_v", cache_v, q.scalar_type(), {num_pages, p.page_size, p.kv_heads, p.head_dim});
  check_tensor("page_table", page_table, ScalarType::Int, {-1, -1});
  check_tensor("own", own, ScalarType::Int, {tokens, 2});
  p.max_pages = page_table.size(1);
  p.num_tiles = tiles.size(0);
  check_tensor("rows", rows, ScalarType::Int, {p.num_tiles});
  p.page_table = page_table.const_data_ptr<int32_t>();
  p.rows = rows.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < p.num_tiles; ++i)
    check(p.rows[i] >= 0 && p.rows[i] < page_table.size(0), "page_table: expected an entry for row ", p.rows[i], ", got shape ",
          shape_text(page_table));
  const int64_t places = p.max_pages * p.page_size;
  check_tensor("tiles", tiles, ScalarType::Int, {-1, 7});
  p.tiles = tiles.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < p.num_tiles; ++i) {
    const int64_t row = p.rows[i], context = p.tiles[7 * i + 3];
    check(context <= places, "page_table: expected pages for the ", context, " cached keys of row ", row, ", got ", places, " places");
    if (i > 0 && p.rows[i - 1] == row && p.tiles[7 * i - 4] >= context) continue;  // checked with the tile before
    for (int64_t page = 0; page * p.page_size < context; ++page) {
      const int32_t number = p.page_table[row * p.max_pages + page];
      check(number >= 0 && number < num_pages, "page_table: expected pages below ", num_pages, ", got ", number, " in row ", row);
    }
  }
  p.max_tile_queries = check_tiles(tiles, order, tokens, tokens, [&](int64_t) { return places; });

  Tensor out = empty_beside(q);
  p.q = q.const_data_ptr(), p.k_new = k_new.const_data_ptr(), p.v_new = v_new.const_data_ptr();
  p.cache_k = cache_k.const_data_ptr(), p.cache_v = cache_v.const_data_ptr();
  p.own = own.const_data_ptr<int32_t>(), p.order = order.const_data_ptr<int32_t>();
  p.out = out.mutable_data_ptr();
  cached_block_attention_cpu(p, torch_threads());
  return out;
}

}  // namespace
}  // namespace llada

STABLE_TORCH_LIBRARY_IMPL(llada_kernels, CPU, m) { m.impl("cached_block_attention", TORCH_BOX(&llada::cached_block_attention)); }
