// Checks of what both attention ops take: heads, and the tile plan, whose numbers become addresses.
#pragma once

#include <algorithm>
#include <vector>

#include "bindings/tensor_checks.h"

namespace llada {

// q [Tq, heads, d] against k, v [Tk, kv_heads, d] of its dtype; returns whether they are bf16.
inline bool check_attention(const Tensor& q, const char* k_name, const Tensor& k, const char* v_name, const Tensor& v) {
  check(q.dim() == 3, "q: expected 3 dimensions, got shape ", shape_text(q));
  check(k.dim() == 3, k_name, ": expected 3 dimensions, got shape ", shape_text(k));
  const bool is_bf16 = check_float_dtype("q", q);
  check_tensor("q", q, q.scalar_type(), {-1, -1, -1});
  check_tensor(k_name, k, q.scalar_type(), {-1, -1, q.size(2)});
  check_tensor(v_name, v, q.scalar_type(), {k.size(0), k.size(1), q.size(2)});
  check(k.size(1) > 0 && q.size(1) > 0 && q.size(1) % k.size(1) == 0, k_name, ": expected a number of heads that divides the ", q.size(1),
        " heads of q, got ", k.size(1));
  check(q.size(2) > 0 && q.size(2) % 8 == 0, "q: expected a head dim that is a multiple of 8, got ", q.size(2));
  return is_bf16;
}

// The permutation `name` of 0 .. count - 1.
inline void check_permutation(const char* name, const Tensor& x, int64_t count) {
  check_tensor(name, x, ScalarType::Int, {count});
  std::vector<bool> seen(count, false);
  const int32_t* values = x.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < count; ++i) {
    check(values[i] >= 0 && values[i] < count && !seen[values[i]], name, ": expected each of 0 .. ", count - 1, " once, got ", values[i],
          " at ", i);
    seen[values[i]] = true;
  }
}

// tiles [N, 7] must cover the queries in order, each once, and stay within the keys. num_context_keys(tile) bounds the context hull.
// Returns the most queries in a tile.
template <class ContextKeys>
int64_t check_tiles(const Tensor& tiles, const Tensor& order, int64_t num_queries, int64_t num_keys, ContextKeys num_context_keys) {
  check_tensor("tiles", tiles, ScalarType::Int, {-1, 7});
  check_permutation("order", order, tiles.size(0));
  const int32_t* t = tiles.const_data_ptr<int32_t>();
  int64_t covered = 0, most = 0;
  for (int64_t i = 0; i < tiles.size(0); ++i, t += 7) {
    check(t[0] == covered && t[1] > t[0], "tiles: expected tile ", i, " to begin at query ", covered, ", got [", t[0], ", ", t[1], ")");
    covered = t[1];
    most = std::max<int64_t>(most, t[1] - t[0]);
    check(t[2] >= 0 && t[3] <= num_context_keys(i), "tiles: context of tile ", i, ": expected keys in [0, ", num_context_keys(i),
          "), got [", t[2], ", ", t[3], ")");
    check(t[4] >= 0 && t[5] <= num_keys, "tiles: own keys of tile ", i, ": expected keys in [0, ", num_keys, "), got [", t[4], ", ", t[5],
          ")");
  }
  check(covered == num_queries, "tiles: expected to cover ", num_queries, " queries, got ", covered);
  return most;
}

}  // namespace llada
