"""Paged KV cache of finished blocks: a denoising step only reads it, ``commit`` writes the blocks that are final."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..masks import DiffusionMask

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of each row's finished blocks, in pages of one block.

    A forward attends to the pages and to its own new keys, which it hands over with :meth:`record`; :meth:`commit` then
    keeps those of the blocks that are final. Pages are given out at the first commit that needs them and come back
    with :meth:`free`, so rows of very different lengths share one pool.

    Precision: keys and values are stored as recorded, in ``dtype``.
    Determinism: pure copies.

    Args:
        num_layers: layers of the model.
        num_rows: rows (sequences) that can be held at once.
        max_tokens: most cached tokens of one row.
        block_size: tokens of a page, which is the block of the diffusion mask.
        num_kv_heads, head_dim: heads of K and V and their width.
        dtype, device: of keys and values.
        num_pages: pages in the pool; by default every row can reach ``max_tokens``.

    Attributes:
        keys, values: per layer, ``dtype`` [num_pages, block_size, num_kv_heads, head_dim].
        page_table: int32 [num_rows, ceil(max_tokens / block_size)], the page of each of a row's blocks (0 where there is none yet).
        context_lens: committed tokens of each row, multiples of block_size.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        max_tokens: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        num_pages: int | None = None,
    ) -> None:
        sizes = {"num_layers": num_layers, "num_rows": num_rows, "max_tokens": max_tokens, "block_size": block_size}
        sizes |= {"num_kv_heads": num_kv_heads, "head_dim": head_dim}
        if num_pages is not None:
            sizes["num_pages"] = num_pages
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.num_rows, self.block_size = num_rows, block_size
        self.max_pages = -(-max_tokens // block_size)
        pages = num_rows * self.max_pages if num_pages is None else num_pages
        shape = (pages, block_size, num_kv_heads, head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.page_table = torch.zeros(num_rows, self.max_pages, dtype=torch.int32, device=device)
        self.context_lens = [0] * num_rows
        self._free_pages = list(range(pages - 1, -1, -1))
        self._pages: list[list[int]] = [[] for _ in range(num_rows)]
        self._query_lens: list[int] | None = None
        self._mask: tuple[tuple[int, ...], DiffusionMask] | None = None
        self._recorded: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    @property
    def num_free_pages(self) -> int:
        """Pages that no row holds."""
        return len(self._free_pages)

    def mask(self, query_lens: Sequence[int]) -> DiffusionMask:
        """The mask of a forward that adds ``query_lens[r]`` new tokens to row r (0: the row takes no part).

        New tokens see all of the row's committed tokens and the new ones up to the end of their own block.

        Raises:
            ValueError: not one length per row, or a negative one.
        """
        lens = [int(n) for n in query_lens]
        if len(lens) != self.num_rows:
            raise ValueError(f"query_lens: expected {self.num_rows} lengths, one per row, got {len(lens)}")
        if min(lens) < 0:
            raise ValueError(f"query_lens: expected lengths of at least 0, got {lens}")
        self._query_lens = lens
        self._recorded = [None] * len(self.keys)
        key = (*self.context_lens, *lens)
        if self._mask is None or self._mask[0] != key:  # the denoising steps of a block share one mask and its tile plan
            context = torch.tensor(self.context_lens, dtype=torch.int32)
            queries = torch.tensor(lens, dtype=torch.int32)
            self._mask = key, DiffusionMask.cached(context, queries, self.block_size).to(self.page_table.device)
        return self._mask[1]

    def record(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep a forward's new keys and values (not copied) until the next :meth:`commit`.

        Args:
            layer: index of the layer.
            k, v: [T, num_kv_heads, head_dim], any float dtype, packed as the last :meth:`mask` said.

        Raises:
            ValueError: their shape is not the one that the last mask and this cache expect.
        """
        tokens = sum(self._query_lens) if self._query_lens is not None else 0
        expected = (tokens, *self.keys[layer].shape[2:])
        for name, x in (("k", k), ("v", v)):
            if tuple(x.shape) != expected:
                raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
        self._recorded[layer] = (k, v)

    def commit(self, lengths: Sequence[int]) -> None:
        """Write the first ``lengths[r]`` recorded tokens of each row into pages, and forget the rest of the record.

        Raises:
            ValueError: a length is not a multiple of block_size, is more than the forward had, or does not fit.
            RuntimeError: nothing was recorded, or the pool has no free page left.
        """
        lens = [int(n) for n in lengths]
        if len(lens) != self.num_rows:
            raise ValueError(f"lengths: expected {self.num_rows} lengths, one per row, got {len(lens)}")
        query_lens, recorded = self._query_lens, self._recorded
        if not any(lens):
            self._forget()
            return
        if query_lens is None or any(r is None for r in recorded):
            raise RuntimeError("commit: no forward has recorded the keys and values of every layer since the last commit")
        for row, (n, new) in enumerate(zip(lens, query_lens, strict=True)):
            if n < 0 or n % self.block_size or n > new:
                raise ValueError(f"lengths[{row}]: expected a multiple of {self.block_size} up to the row's {new} new tokens, got {n}")
            if self.context_lens[row] + n > self.max_pages * self.block_size:
                raise ValueError(
                    f"lengths[{row}]: expected at most {self.max_pages * self.block_size} tokens in the row, "
                    f"got {self.context_lens[row]} + {n}"
                )
        wanted = sum(lens) // self.block_size
        if wanted > len(self._free_pages):
            raise RuntimeError(f"commit: {wanted} pages are needed and {len(self._free_pages)} are free")
        source, target = self._claim(lens, query_lens)
        for layer, pair in enumerate(recorded):
            assert pair is not None
            for pages, x in ((self.keys[layer], pair[0]), (self.values[layer], pair[1])):
                pages.flatten(0, 1).index_copy_(0, target, x.detach().index_select(0, source).to(pages.dtype))
        self._forget()

    def free(self, row: int) -> None:
        """Give the row's pages back and empty it."""
        self._free_pages.extend(reversed(self._pages[row]))
        self._pages[row] = []
        self.context_lens[row] = 0
        self.page_table[row].zero_()

    def _claim(self, lens: list[int], query_lens: list[int]) -> tuple[Tensor, Tensor]:
        """Take pages for the new blocks; int64 indices of the packed tokens to copy, and of the slots they go to."""
        source, target, begin = [], [], 0
        block = torch.arange(self.block_size)
        for row, (n, new) in enumerate(zip(lens, query_lens, strict=True)):
            pages = [self._free_pages.pop() for _ in range(n // self.block_size)]
            if pages:
                old, index = len(self._pages[row]), torch.tensor(pages)
                self.page_table[row, old : old + len(pages)] = index.to(self.page_table)
                self._pages[row] += pages
                source.append(torch.arange(begin, begin + n))
                target.append((index[:, None] * self.block_size + block).flatten())
                self.context_lens[row] += n
            begin += new
        device = self.page_table.device
        return torch.cat(source).to(device), torch.cat(target).to(device)

    def _forget(self) -> None:
        self._query_lens = None
        self._recorded = [None] * len(self.keys)
