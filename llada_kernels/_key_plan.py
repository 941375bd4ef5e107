"""The key plan of a mask: which queries see each tile of keys, and which of them see all of it.

The key-stationary half of a GPU's backward walks it. A tile of keys lists stretches of consecutive queries: first those that see every
key of the tile, which need no mask per element, then those at the edges of their intervals. Size and time are linear in tokens, but for
what a query tile sees partly. Built from the tile plan, so stretches begin and end where query tiles do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ._tile_plan import _difference, _shifted, moved_to

__all__ = ["KeyPlan", "build_key_plan"]

_Ints = npt.NDArray[np.int64]
_Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class KeyPlan:
    """Tiles of ``block_n`` keys of one mask.

    Attributes:
        offsets: int32 [key tiles, 3]: the tile's stretches are ``[0], [1]`` (whole tile visible) and ``[1], [2]`` (partly).
        stretches: int32 [M, 3], rows (q_begin, q_end, which): seen through context (0) or own (1).
        order: int32 [key tiles], by falling number of queries; ties by index.
        block_n: keys in a tile.
    """

    offsets: Tensor
    stretches: Tensor
    order: Tensor
    block_n: int

    def to(self, device: torch.device) -> KeyPlan:
        """The same plan with its tensors on ``device``."""
        moved: dict[str, Any] = {name: moved_to(getattr(self, name), device) for name in ("offsets", "stretches", "order")}
        return replace(self, **moved)


def build_key_plan(context: _Int32s, own: _Int32s, tiles: _Int32s, num_keys: int, block_n: int) -> KeyPlan:
    """Plan the key tiles for the queries of ``tiles`` (see :class:`TilePlan`), whose intervals are ``context`` and ``own``."""
    key_tiles = -(-num_keys // block_n)
    parts = [np.zeros((0, 5), np.int64)]
    for which, intervals in enumerate((context, own)):
        if len(tiles) == 0:
            break
        begin, end = intervals.astype(np.int64).T
        hull_begin, hull_end = tiles[:, 2 + 2 * which].astype(np.int64), tiles[:, 3 + 2 * which].astype(np.int64)
        first, last = hull_begin // block_n, -(-hull_end // block_n)
        # The key tiles that every query of the tile sees whole; a query with an empty interval leaves none.
        starts = tiles[:, 0]
        all_begin, all_end = np.maximum.reduceat(begin, starts), np.minimum.reduceat(end, starts)
        full_first = np.clip(-(-all_begin // block_n), first, last)
        full_last = np.clip(all_end // block_n, full_first, last)
        for partly, (a, b) in ((1, (first, full_first)), (0, (full_first, full_last)), (1, (full_last, last))):
            # A stretch starts where a tile sees a key tile that the tile before it does not, and ends likewise.
            opened = _difference(a, b, _shifted(a, 1), _shifted(b, 1))
            closed = _difference(a, b, _shifted(a, -1), _shifted(b, -1))
            q_begin, q_end = tiles[opened[1], 0].astype(np.int64), tiles[closed[1], 1].astype(np.int64)
            parts.append(np.stack([opened[0], np.full(len(q_begin), partly), q_begin, q_end, np.full(len(q_begin), which)], 1))
    table = np.concatenate(parts)
    table = table[np.lexsort((table[:, 4], table[:, 2], table[:, 1], table[:, 0]))]
    counts = np.bincount(2 * table[:, 0] + table[:, 1], minlength=2 * key_tiles)
    edges = np.concatenate([[0], np.cumsum(counts)])
    offsets = np.stack([edges[:-2:2], edges[1:-1:2], edges[2::2]], 1) if key_tiles else np.zeros((0, 3))
    work = np.bincount(table[:, 0], weights=table[:, 3] - table[:, 2], minlength=key_tiles)[:key_tiles]
    order = np.argsort(-work, kind="stable")
    tensors = [torch.from_numpy(np.ascontiguousarray(x, np.int32)) for x in (offsets, table[:, 2:], order)]
    return KeyPlan(tensors[0], tensors[1], tensors[2], block_n)
