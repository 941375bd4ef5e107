"""The tile plan of a mask: which tiles of queries an attention kernel visits, and the keys that each of them can see.

A kernel works on tiles of up to ``block_m`` consecutive queries. The plan cuts the queries where a new document, stream, view or
cached row begins, so that the keys of a tile are at most two short ranges, and states these ranges (hulls) and whether every query
of the tile sees exactly the same keys (then no element of the tile needs a mask). For the key-stationary half of the backward
the plan also lists, per tile of ``block_n`` keys, the runs of query tiles that can see it. Size and time are linear in tokens.

The C++ module ``llada_kernels._host`` and the numpy twin in this file compute identical plans.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

try:
    from . import _host  # type: ignore[attr-defined, unused-ignore]
except ImportError:  # the twin below serves
    _host = None  # type: ignore[assignment, unused-ignore]

__all__ = ["BLOCK_M", "BLOCK_N", "TilePlan", "build_plan", "moved_to"]

#: Tokens per query tile and per key tile of the plan that every mask has from the start.
BLOCK_M = 32
BLOCK_N = 64

_Ints = npt.NDArray[np.int64]
_Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Tiles of queries and keys of one mask.

    Attributes:
        tiles: int32 [N, 7], per tile q_begin, q_end, context_begin, context_end, own_begin, own_end, uniform. The key ranges are
            hulls over the tile's queries, (0, 0) when empty; uniform is 1 when all its queries see exactly these keys.
        order: int32 [N], the tiles by falling work (longest first keeps threads busy to the end); ties by index.
        rows: int32 [N], the cached row of each tile; 0 for a mask without a cache.
        key_offsets: int32 [num_keys / block_n rounded up, plus 1]: range of ``key_runs`` of each tile of block_n keys.
        key_runs: int32 [M, 3], rows (tile_begin, tile_end, which): query tiles whose context (0) or own (1) hull touches the key tile.
        key_order: int32, the key tiles by falling work; ties by index. The three key fields are empty for a mask with a cache.
        block_m: most queries in a tile.
        block_n: keys in a key tile.
    """

    tiles: Tensor
    order: Tensor
    rows: Tensor
    key_offsets: Tensor
    key_runs: Tensor
    key_order: Tensor
    block_m: int
    block_n: int

    def to(self, device: torch.device) -> TilePlan:
        """The same plan with its tensors on ``device``."""
        names = ("tiles", "order", "rows", "key_offsets", "key_runs", "key_order")
        moved: dict[str, Any] = {name: moved_to(getattr(self, name), device) for name in names}
        return replace(self, **moved)


def moved_to(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``. Masks are planned on the host: to a GPU they go without waiting for what it computes."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def build_plan(
    context: _Int32s, own: _Int32s, row_starts: _Ints | None, num_keys: int, block_m: int, block_n: int, *, use_host: bool | None = None
) -> TilePlan:
    """Plan the tiles of the intervals ``context`` and ``own``.

    Args:
        context: int32 [T, 2], half-open intervals.
        own: int32 [T, 2], likewise.
        row_starts: int64 [R + 1], cumulative query counts of the rows of a cache, or None.
        num_keys: number of keys, for the key-stationary half.
        block_m: most queries in a tile.
        block_n: keys in a key tile.
        use_host: True: the C++ planner, False: the numpy twin, None: C++ where it is available.
    """
    if use_host is None:
        use_host = _host is not None
    planner = _host if use_host else None
    plan_tiles = planner.plan_tiles if planner is not None else _plan_tiles
    plan_keys = planner.plan_keys if planner is not None else _plan_keys
    cuts = np.zeros(1, np.int64) if row_starts is None else row_starts
    tiles, order, rows = plan_tiles(np.ascontiguousarray(context), np.ascontiguousarray(own), cuts, block_m)
    offsets, runs, key_order = plan_keys(tiles, 0 if row_starts is not None else num_keys, block_n)
    tensor = torch.from_numpy
    return TilePlan(tensor(tiles), tensor(order), tensor(rows), tensor(offsets), tensor(runs), tensor(key_order), block_m, block_n)


def _plan_tiles(context: _Int32s, own: _Int32s, row_starts: _Ints, block_m: int) -> tuple[_Int32s, _Int32s, _Int32s]:
    """Tiles, their order and their cached rows (see :class:`TilePlan`)."""
    n = len(context)
    if n == 0:
        return np.zeros((0, 7), np.int32), np.zeros(0, np.int32), np.zeros(0, np.int32)
    (c0, c1), (o0, o1) = context.astype(np.int64).T, own.astype(np.int64).T
    has_context, has_own = c1 > c0, o1 > o0

    # A group is a stretch of queries worth sharing a tile: one document of one stream or view, one cached row.
    group = np.ones(n, bool)
    group[1:] = (c0[1:] != c0[:-1]) | (c1[1:] < c1[:-1]) | (o0[1:] < o0[:-1]) | (has_own[1:] != has_own[:-1])
    group[row_starts[row_starts < n]] = True
    # A segment is a stretch of queries that see the same keys; long ones get tiles of their own, which then are uniform.
    seen = np.stack([c0 * has_context, c1 * has_context, o0 * has_own, o1 * has_own], axis=1)
    change = np.ones(n, bool)
    change[1:] = (seen[1:] != seen[:-1]).any(axis=1)
    starts = np.flatnonzero(change | group)
    long = np.diff(starts, append=n) >= block_m
    group[starts[long]] = True
    group[starts[1:][long[:-1]]] = True

    index = np.arange(n)
    group_start = np.maximum.accumulate(np.where(group, index, 0))
    begin = np.flatnonzero((index - group_start) % block_m == 0)
    tiles = np.zeros((len(begin), 7), np.int64)
    tiles[:, 0], tiles[:, 1] = begin, np.append(begin[1:], n)
    for column, first, last, some in ((2, c0, c1, has_context), (4, o0, o1, has_own)):
        ends = np.maximum.reduceat(np.where(some, last, 0), begin)
        begins = np.minimum.reduceat(np.where(some, first, np.iinfo(np.int64).max), begin)
        tiles[:, column], tiles[:, column + 1] = np.where(ends > 0, begins, 0), ends
    inner = change.copy()
    inner[begin] = False
    tiles[:, 6] = np.add.reduceat(inner, begin, dtype=np.int64) == 0
    work = (tiles[:, 1] - tiles[:, 0]) * (tiles[:, 3] - tiles[:, 2] + tiles[:, 5] - tiles[:, 4])
    order = np.argsort(-work, kind="stable")
    rows = np.maximum(np.searchsorted(row_starts, begin, side="right") - 1, 0)
    return tiles.astype(np.int32), order.astype(np.int32), rows.astype(np.int32)


def _plan_keys(tiles: _Int32s, num_keys: int, block_n: int) -> tuple[_Int32s, _Int32s, _Int32s]:
    """Runs of query tiles per key tile: offsets, runs, order of the key tiles (see :class:`TilePlan`)."""
    key_tiles = -(-num_keys // block_n)
    if key_tiles == 0:
        return np.zeros(1, np.int32), np.zeros((0, 3), np.int32), np.zeros(0, np.int32)
    runs = []
    for which, column in ((0, 2), (1, 4)):
        first = tiles[:, column].astype(np.int64) // block_n
        last = -(-tiles[:, column + 1].astype(np.int64) // block_n)
        # A run starts where a tile touches a key tile that the tile before it does not, and ends likewise.
        opened = _difference(first, last, _shifted(first, 1), _shifted(last, 1))
        closed = _difference(first, last, _shifted(first, -1), _shifted(last, -1))
        runs.append(np.stack([opened[0], np.full(len(opened[0]), which), opened[1], closed[1] + 1], axis=1))
    table = np.concatenate(runs)
    table = table[np.lexsort((table[:, 2], table[:, 1], table[:, 0]))]
    offsets = np.zeros(key_tiles + 1, np.int64)
    np.cumsum(np.bincount(table[:, 0], minlength=key_tiles), out=offsets[1:])
    work = np.bincount(table[:, 0], weights=table[:, 3] - table[:, 2], minlength=key_tiles).astype(np.int64)
    order = np.argsort(-work, kind="stable")
    return offsets.astype(np.int32), np.ascontiguousarray(table[:, [2, 3, 1]], np.int32), order.astype(np.int32)


def _shifted(values: _Ints, by: int) -> _Ints:
    """``values`` moved by one place, 0 moved in."""
    result = np.zeros_like(values)
    if by > 0:
        result[1:] = values[:-1]
    else:
        result[:-1] = values[1:]
    return result


def _difference(first: _Ints, last: _Ints, other_first: _Ints, other_last: _Ints) -> tuple[_Ints, _Ints]:
    """All (key tile, tile) with the key tile in [first, last) but not in [other_first, other_last) of that tile, sorted."""
    left, right = np.minimum(last, other_first), np.maximum(first, other_last)
    begin = np.concatenate([first, right])
    count = np.maximum(np.concatenate([left, last]) - begin, 0)
    tile = np.repeat(np.tile(np.arange(len(first)), 2), count)
    within = np.arange(len(tile)) - np.repeat(np.cumsum(count) - count, count)
    key_tile = np.repeat(begin, count) + within
    sort = np.lexsort((tile, key_tile))
    return key_tile[sort], tile[sort]
