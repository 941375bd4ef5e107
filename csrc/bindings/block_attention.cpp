#include "block_attention/params.h"

#include "bindings/attention_checks.h"

namespace llada {
namespace {

// Everything but the outputs.
BlockAttentionParams parameters(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& context, const Tensor& own,
                                const Tensor& tiles, const Tensor& order, const Tensor& key_offsets, const Tensor& key_runs,
                                const Tensor& key_order, int64_t block_n, double scale) {
  BlockAttentionParams p{};
  p.bf16 = check_attention(q, "k", k, "v", v);
  p.num_queries = q.size(0), p.num_keys = k.size(0), p.heads = q.size(1), p.kv_heads = k.size(1), p.head_dim = q.size(2);
  p.scale = float(scale);
  check_tensor("context", context, ScalarType::Int, {p.num_queries, 2});
  check_tensor("own", own, ScalarType::Int, {p.num_queries, 2});
  p.max_tile_queries = check_tiles(tiles, order, p.num_queries, p.num_keys, [&](int64_t) { return p.num_keys; });
  p.num_tiles = tiles.size(0);

  check(block_n == kAttentionKeyBlock, "block_n: expected ", kAttentionKeyBlock, ", got ", block_n);
  p.num_key_blocks = (p.num_keys + block_n - 1) / block_n;
  check_tensor("key_offsets", key_offsets, ScalarType::Int, {p.num_key_blocks + 1});
  check_tensor("key_runs", key_runs, ScalarType::Int, {-1, 3});
  check_permutation("key_order", key_order, p.num_key_blocks);
  const int32_t *offsets = key_offsets.const_data_ptr<int32_t>(), *runs = key_runs.const_data_ptr<int32_t>();
  check(offsets[0] == 0 && offsets[p.num_key_blocks] == key_runs.size(0), "key_offsets: expected to run from 0 to ", key_runs.size(0));
  for (int64_t i = 0; i < p.num_key_blocks; ++i) check(offsets[i] <= offsets[i + 1], "key_offsets: expected values that never fall");
  for (int64_t i = 0; i < key_runs.size(0); ++i) {
    const int32_t* r = runs + 3 * i;
    check(r[0] >= 0 && r[1] <= p.num_tiles && (r[2] == 0 || r[2] == 1), "key_runs: expected tiles in [0, ", p.num_tiles,
          ") and 0 or 1, got [", r[0], ", ", r[1], ") and ", r[2]);
  }

  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.context = context.const_data_ptr<int32_t>(), p.own = own.const_data_ptr<int32_t>();
  p.tiles = tiles.const_data_ptr<int32_t>(), p.order = order.const_data_ptr<int32_t>();
  p.key_offsets = offsets, p.key_runs = runs, p.key_order = key_order.const_data_ptr<int32_t>();
  return p;
}

std::tuple<Tensor, Tensor> block_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& context, const Tensor& own,
                                           const Tensor& tiles, const Tensor& order, const Tensor& key_offsets, const Tensor& key_runs,
                                           const Tensor& key_order, int64_t block_n, double scale) {
  BlockAttentionParams p = parameters(q, k, v, context, own, tiles, order, key_offsets, key_runs, key_order, block_n, scale);
  Tensor out = empty_beside(q);
  Tensor lse = empty_beside(q, {p.num_queries, p.heads}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  block_attention_cpu(p, torch_threads());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> block_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                                            const Tensor& out, const Tensor& lse, const Tensor& context, const Tensor& own,
                                                            const Tensor& tiles, const Tensor& order, const Tensor& key_offsets,
                                                            const Tensor& key_runs, const Tensor& key_order, int64_t block_n,
                                                            double scale) {
  BlockAttentionParams p = parameters(q, k, v, context, own, tiles, order, key_offsets, key_runs, key_order, block_n, scale);
  check_tensor("grad_out", grad_out, q.scalar_type(), {p.num_queries, p.heads, p.head_dim});
  check_tensor("out", out, q.scalar_type(), {p.num_queries, p.heads, p.head_dim});
  check_tensor("lse", lse, ScalarType::Float, {p.num_queries, p.heads});
  p.out = const_cast<void*>(out.const_data_ptr());  // the kernel only reads them
  p.lse = const_cast<float*>(lse.const_data_ptr<float>());
  Tensor grad_q = empty_beside(q), grad_k = empty_beside(k), grad_v = empty_beside(v);
  block_attention_backward_cpu(
      {p, grad_out.const_data_ptr(), grad_q.mutable_data_ptr(), grad_k.mutable_data_ptr(), grad_v.mutable_data_ptr()}, torch_threads());
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace llada

STABLE_TORCH_LIBRARY_IMPL(llada_kernels, CPU, m) {
  m.impl("block_attention", TORCH_BOX(&llada::block_attention));
  m.impl("block_attention_backward", TORCH_BOX(&llada::block_attention_backward));
}
