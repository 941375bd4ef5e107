// llada_kernels._host: the tile planner and a description of the build. Torch-free and optional: llada_kernels/_tile_plan.py has a
// numpy twin of the planner that computes identical plans (the tests compare them), and documents what the fields mean.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "common/cpu_level.h"

namespace py = pybind11;

namespace {

using Ints = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Longs = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

struct Interval {
  int64_t begin, end;

  bool empty() const { return begin >= end; }
  int64_t size() const { return empty() ? 0 : end - begin; }
  // The same keys: all empty intervals are alike.
  bool sees_as(Interval other) const { return empty() ? other.empty() : begin == other.begin && end == other.end; }
  void cover(Interval other) {
    if (other.empty()) return;
    begin = empty() ? other.begin : std::min(begin, other.begin);
    end = std::max(end, other.end);
  }
};

struct Tile {
  int64_t begin, end;
  Interval context, own;
  bool uniform;

  int64_t work() const { return (end - begin) * (context.size() + own.size()); }
};

Ints to_array(const std::vector<int32_t>& values, py::ssize_t columns = 0) {
  const auto n = static_cast<py::ssize_t>(values.size());
  Ints array(columns == 0 ? std::vector<py::ssize_t>{n} : std::vector<py::ssize_t>{n / columns, columns});
  std::copy(values.begin(), values.end(), array.mutable_data());
  return array;
}

// Indices of `work` by falling value, ties by index.
std::vector<int32_t> longest_first(const std::vector<int64_t>& work) {
  std::vector<int32_t> order(work.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return work[a] > work[b]; });
  return order;
}

py::tuple plan_tiles(const Ints& context_array, const Ints& own_array, const Longs& row_starts, int64_t block_m) {
  if (context_array.ndim() != 2 || own_array.ndim() != 2 || context_array.shape(1) != 2 || own_array.shape(1) != 2 ||
      context_array.shape(0) != own_array.shape(0) || row_starts.ndim() != 1 || row_starts.shape(0) < 1 || block_m < 1)
    throw std::invalid_argument("plan_tiles: expected context [T, 2], own [T, 2], row_starts [R + 1], block_m >= 1");
  const int64_t n = context_array.shape(0);
  const int32_t *c = context_array.data(), *o = own_array.data();
  const auto context = [&](int64_t q) { return Interval{c[2 * q], c[2 * q + 1]}; };
  const auto own = [&](int64_t q) { return Interval{o[2 * q], o[2 * q + 1]}; };

  // group: queries worth sharing a tile (one document of one stream, one row). segment: queries that see the same keys.
  std::vector<char> group(n, 0), change(n, 0);
  for (int64_t r = 0; r < row_starts.shape(0); ++r)
    if (row_starts.at(r) >= 0 && row_starts.at(r) < n) group[row_starts.at(r)] = 1;
  for (int64_t q = 0; q < n; ++q) {
    if (q == 0) {
      group[q] = change[q] = 1;
      continue;
    }
    const Interval context0 = context(q - 1), context1 = context(q), own0 = own(q - 1), own1 = own(q);
    group[q] |= context1.begin != context0.begin || context1.end < context0.end || own1.begin < own0.begin || own1.empty() != own0.empty();
    change[q] = !context1.sees_as(context0) || !own1.sees_as(own0);
  }
  for (int64_t q = 0; q < n;) {  // a long segment gets tiles of its own
    int64_t end = q + 1;
    while (end < n && !change[end] && !(group[end] & 1)) ++end;
    if (end - q >= block_m) {
      group[q] |= 2;  // another bit: segments are cut by the first one only
      if (end < n) group[end] |= 2;
    }
    q = end;
  }

  std::vector<Tile> tiles;
  for (int64_t q = 0, group_start = 0; q < n; ++q) {
    if (group[q]) group_start = q;
    const bool first = (q - group_start) % block_m == 0;
    if (first) tiles.push_back({q, q, {0, 0}, {0, 0}, true});
    Tile& tile = tiles.back();
    tile.end = q + 1;
    tile.context.cover(context(q));
    tile.own.cover(own(q));
    tile.uniform = tile.uniform && (first || !change[q]);
  }

  std::vector<int32_t> table, rows;
  std::vector<int64_t> work;
  int64_t row = 0;
  for (const Tile& t : tiles) {
    for (int64_t value : {t.begin, t.end, t.context.begin, t.context.end, t.own.begin, t.own.end, int64_t{t.uniform}})
      table.push_back(static_cast<int32_t>(value));
    work.push_back(t.work());
    while (row + 1 < row_starts.shape(0) && row_starts.at(row + 1) <= t.begin) ++row;
    rows.push_back(static_cast<int32_t>(row));
  }
  return py::make_tuple(to_array(table, 7), to_array(longest_first(work)), to_array(rows));
}

py::tuple plan_keys(const Ints& tiles, int64_t num_keys, int64_t block_n) {
  if (tiles.ndim() != 2 || tiles.shape(1) != 7 || num_keys < 0 || block_n < 1)
    throw std::invalid_argument("plan_keys: expected tiles [N, 7], num_keys >= 0, block_n >= 1");
  struct Run {
    int64_t key_tile;
    int32_t which, begin, end;
  };
  const int64_t key_tiles = (num_keys + block_n - 1) / block_n, n = tiles.shape(0);
  std::vector<Run> runs;
  for (int32_t which = 0; which < 2; ++which) {
    const auto touched = [&](int64_t t) -> Interval {  // key tiles that the hull of tile t touches
      if (t < 0 || t >= n) return {0, 0};
      const int64_t begin = tiles.at(t, 2 + 2 * which), end = tiles.at(t, 3 + 2 * which);
      return {begin / block_n, (end + block_n - 1) / block_n};
    };
    std::vector<int32_t> opened(key_tiles, 0);
    for (int64_t t = 0; key_tiles > 0 && t < n; ++t) {
      const Interval now = touched(t), before = touched(t - 1), after = touched(t + 1);
      if (now.end > key_tiles) throw std::invalid_argument("plan_keys: a tile reaches beyond num_keys");
      for (Interval piece : {Interval{now.begin, std::min(now.end, before.begin)}, Interval{std::max(now.begin, before.end), now.end}})
        for (int64_t j = piece.begin; j < piece.end; ++j) opened[j] = static_cast<int32_t>(t);
      for (Interval piece : {Interval{now.begin, std::min(now.end, after.begin)}, Interval{std::max(now.begin, after.end), now.end}})
        for (int64_t j = piece.begin; j < piece.end; ++j) runs.push_back({j, which, opened[j], static_cast<int32_t>(t + 1)});
    }
  }
  std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) {
    if (a.key_tile != b.key_tile) return a.key_tile < b.key_tile;
    return a.which != b.which ? a.which < b.which : a.begin < b.begin;
  });
  std::vector<int32_t> offsets(key_tiles + 1, 0), table;
  std::vector<int64_t> work(key_tiles, 0);
  for (const Run& run : runs) {
    ++offsets[run.key_tile + 1];
    work[run.key_tile] += run.end - run.begin;
    for (int32_t value : {run.begin, run.end, run.which}) table.push_back(value);
  }
  std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
  return py::make_tuple(to_array(offsets), to_array(table, 3), to_array(longest_first(work)));
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host helpers of llada_kernels: tile planner, build information.";
  m.def("plan_tiles", &plan_tiles, py::arg("context"), py::arg("own"), py::arg("row_starts"), py::arg("block_m"),
        "(tiles, order, rows) of a mask's intervals; see llada_kernels/_tile_plan.py.");
  m.def("plan_keys", &plan_keys, py::arg("tiles"), py::arg("num_keys"), py::arg("block_n"),
        "(key_offsets, key_runs, key_order) of a plan's tiles; see llada_kernels/_tile_plan.py.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["cplusplus"] = static_cast<int64_t>(__cplusplus);
#if defined(__x86_64__)
        info["architecture"] = "x86_64";
#elif defined(__aarch64__)
        info["architecture"] = "aarch64";
#else
        info["architecture"] = "other";
#endif
        return info;
      },
      "Compiler, language level and architecture of this build.");
}
