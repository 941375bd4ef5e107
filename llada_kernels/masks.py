"""Which keys each query sees: every mask of this family is at most two contiguous key intervals per query.

``context`` are keys of the clean stream (earlier blocks of the same document), ``own`` keys of the query's own block. Two int32
numbers each describe masks whose dense form would be (2L)^2: kernels walk the intervals, nothing here is quadratic except
:meth:`DiffusionMask.dense`.

The training row is ``[x_t1; ...; x_tr; x_0]``: r noisy copies of the whole pack, then the clean one. A noisy token sees its own
noisy block and the clean tokens of earlier blocks; a clean token sees the clean tokens up to the end of its block. Nothing
crosses a document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ._key_plan import KeyPlan, build_key_plan
from ._tile_plan import BLOCK_M, BLOCK_N, TilePlan, build_plan, moved_to

__all__ = ["DiffusionMask", "TilePlan", "block_ids"]

#: Sizes of the plans that kernels for a GPU use: tokens per query tile (128 rows over 4, 2 or 1 heads), keys per tile.
GPU_BLOCK_M = (32, 64, 128)
GPU_BLOCK_N = 128

Kind = Literal["block_diffusion", "bidirectional", "block_causal", "causal", "cached", "intervals"]
BlockOrigin = Literal["document", "row"]
Lengths = Tensor | Sequence[int] | npt.NDArray[Any]
_Ints = npt.NDArray[np.int64]
_Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class DiffusionMask:
    """Visibility of keys, one row per query; make one with a class method, outside of compiled functions, and pass it to them.

    Attributes:
        context: int32 [Tq, 2], half-open interval of clean keys (for ``cached``: of the row's cached keys, counted from its start).
        own: int32 [Tq, 2], half-open interval of keys of the own block (for ``cached``: of the packed new keys). May be empty.
        num_keys: number of keys; for ``cached`` of the new ones.
        position_ids: int64 [Tq], restart at 0 in every document, equal in all copies of it; continue the context for ``cached``.
        kind: which class method made it; ``"intervals"`` for :meth:`from_dense`.
        block_size: diffusion block, or 0 where there is none.
        views: noisy copies in front of the clean one; 0 where there is no clean copy apart.
        num_noisy: tokens of one noisy copy.
        noisy_index: int64 [num_noisy], place in the clean pack of each token of a noisy copy.
        context_lens: int32 [R], cached keys per row (``cached`` only, else None).
        query_lens: int32 [R], new tokens per row (``cached`` only, else None).
        cu_query_lens: int32 [R + 1], their running sum (``cached`` only, else None).
    """

    context: Tensor
    own: Tensor
    num_keys: int
    position_ids: Tensor
    kind: Kind
    block_size: int = 0
    views: int = 0
    num_noisy: int = 0
    noisy_index: Tensor | None = None
    context_lens: Tensor | None = None
    query_lens: Tensor | None = None
    cu_query_lens: Tensor | None = None
    _plans: dict[tuple[int, int], TilePlan] = field(default_factory=dict, repr=False)
    _key_plans: dict[int, KeyPlan] = field(default_factory=dict, repr=False)
    _parts: dict[int, DiffusionMask] = field(default_factory=dict, repr=False)
    # context and own on the host, kept when a mask goes to a GPU: whatever is planned later reads nothing back from there.
    _host: tuple[_Int32s, _Int32s] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.num_keys >= 2**31:
            raise ValueError(f"mask: expected fewer than 2^31 keys, got {self.num_keys}")
        # Now, so that code compiled later finds them, and nothing waits for a GPU in the middle of a step.
        self.tile_plan()
        if self.device.type == "cuda":
            self._plan_for_gpu()

    @classmethod
    def block_diffusion(
        cls,
        cu_seqlens: Lengths,
        block_size: int,
        views: int = 1,
        noisy_blocks: Tensor | Sequence[bool] | npt.NDArray[Any] | None = None,
        block_origin: BlockOrigin = "document",
        *,
        num_tokens: int | None = None,
    ) -> DiffusionMask:
        """The training layout [x_t1; ...; x_tr; x_0] of a pack of documents (Eq. 3 of the LLaDA2.0 report).

        Args:
            cu_seqlens: integers [documents + 1], running sum of the document lengths (0 is a legal length) of one copy.
            block_size: tokens per diffusion block; the last block of a document may be shorter.
            views: number of noisy copies r; they share the clean copy.
            noisy_blocks: bool [blocks], the blocks that the noisy copies hold (documents in order, blocks in order); None: all.
            block_origin: ``"document"`` counts blocks from the document's start, ``"row"`` from the start of the pack, so
                that the first block of a document may be short.
            num_tokens: tokens of one copy, checked against the end of ``cu_seqlens`` when given.

        Raises:
            ValueError: an argument has a wrong shape, type of number or value.
            TypeError: ``block_size`` or ``views`` is not an int.
        """
        cu, device = _cu_seqlens(cu_seqlens, num_tokens)
        size, r = _positive("block_size", block_size), _positive("views", views)
        document_start, _ = _documents(cu)
        block, start, end = _blocks(cu, size, block_origin)
        length, num_blocks = len(block), int(block[-1]) + 1 if len(block) else 0
        kept = np.ones(num_blocks, bool) if noisy_blocks is None else _bools("noisy_blocks", noisy_blocks, num_blocks)
        index = np.flatnonzero(kept[block])
        n = len(index)
        clean = r * n
        # Where the tokens before i of the pack end up in a noisy copy: the own block is contiguous there too.
        compact = np.concatenate([[0], np.cumsum(kept[block])]).astype(np.int64)
        views_at = np.repeat(np.arange(r, dtype=np.int64) * n, n)
        noisy_context = np.stack([clean + document_start[index], clean + start[index]], 1)
        noisy_own = np.stack([compact[start[index]], compact[end[index]]], 1)
        clean_context = np.stack([clean + document_start, clean + end], 1)
        context = np.concatenate([np.tile(noisy_context, (r, 1)), clean_context])
        own = np.concatenate([np.tile(noisy_own, (r, 1)) + views_at[:, None], np.repeat(clean + end[:, None], 2, 1)])
        position = np.arange(length) - document_start
        return cls(
            *_intervals(context, own), clean + length, _tensor(np.concatenate([np.tile(position[index], r), position])),
            "block_diffusion", size, r, n, _tensor(index),
        ).to(device)  # fmt: skip

    @classmethod
    def bidirectional(cls, cu_seqlens: Lengths, *, num_tokens: int | None = None) -> DiffusionMask:
        """Every token sees its whole document (Eq. 4): MDLM training, and a plain forward. Arguments as :meth:`block_diffusion`."""
        cu, device = _cu_seqlens(cu_seqlens, num_tokens)
        start, end = _documents(cu)
        return cls._one_interval(start, end, start, "bidirectional", 0, device)

    @classmethod
    def block_causal(
        cls, cu_seqlens: Lengths, block_size: int, block_origin: BlockOrigin = "document", *, num_tokens: int | None = None
    ) -> DiffusionMask:
        """Every token sees its document up to the end of its own block. Arguments as :meth:`block_diffusion`."""
        cu, device = _cu_seqlens(cu_seqlens, num_tokens)
        size = _positive("block_size", block_size)
        start, _ = _documents(cu)
        return cls._one_interval(start, _blocks(cu, size, block_origin)[2], start, "block_causal", size, device)

    @classmethod
    def causal(cls, cu_seqlens: Lengths, *, num_tokens: int | None = None) -> DiffusionMask:
        """Every token sees its document up to itself: the autoregressive parent. Arguments as :meth:`block_diffusion`."""
        cu, device = _cu_seqlens(cu_seqlens, num_tokens)
        start, _ = _documents(cu)
        return cls._one_interval(start, np.arange(1, len(start) + 1), start, "causal", 1, device)

    @classmethod
    def cached(cls, context_lens: Lengths, query_lens: Lengths, block_size: int) -> DiffusionMask:
        """Row r's new tokens see its cached keys and the new keys from the row's start to the end of their own block.

        One denoised block, a prefill, or the commit of a block together with the next one. A context is a whole number of blocks.

        Args:
            context_lens: integers [R], cached keys per row, multiples of ``block_size``.
            query_lens: integers [R], new tokens per row, packed one row after the other.
            block_size: tokens per diffusion block.

        Raises:
            ValueError: an argument has a wrong shape, type of number or value.
            TypeError: ``block_size`` is not an int.
        """
        size = _positive("block_size", block_size)
        (cached, device), (new, _) = _integers("context_lens", context_lens), _integers("query_lens", query_lens)
        for name, values in (("context_lens", cached), ("query_lens", new)):
            if (values < 0).any():
                raise ValueError(f"{name}: expected lengths >= 0, got {int(values.min())} in row {int(values.argmin())}")
        if len(cached) != len(new):
            raise ValueError(f"query_lens: expected one entry per row of context_lens ({len(cached)}), got {len(new)}")
        if (cached % size).any():
            row = int(np.flatnonzero(cached % size)[0])
            raise ValueError(f"context_lens: expected multiples of block_size {size}, got {int(cached[row])} in row {row}")
        cu = np.concatenate([[0], np.cumsum(new)])
        row_of = np.repeat(np.arange(len(new)), new)
        start, end = cu[row_of], _blocks(cu, size, "document")[2]
        context = np.stack([np.zeros_like(start), cached[row_of]], 1)
        position = cached[row_of] + np.arange(len(start)) - start
        return cls(
            *_intervals(context, np.stack([start, end], 1)), int(cu[-1]), _tensor(position), "cached", size,
            context_lens=_tensor(cached.astype(np.int32)), query_lens=_tensor(new.astype(np.int32)),
            cu_query_lens=_tensor(cu.astype(np.int32)),
        ).to(device)  # fmt: skip

    @classmethod
    def from_dense(cls, dense: Tensor) -> DiffusionMask | None:
        """The mask with the given dense form, or None when some query sees more than two intervals.

        Args:
            dense: bool [Tq, Tk], or [B, Sq, Sk] for rows that do not see each other. Positions count from each row's start.

        Raises:
            ValueError: ``dense`` has another shape or dtype.
        """
        if not isinstance(dense, Tensor):
            raise TypeError(f"dense: expected a torch.Tensor, got {type(dense).__name__}")
        if dense.dtype != torch.bool or dense.dim() not in (2, 3):
            raise ValueError(f"dense: expected a bool tensor [Tq, Tk] or [B, Sq, Sk], got {dense.dtype} {list(dense.shape)}")
        device = dense.device
        visible = (dense if dense.dim() == 3 else dense[None]).cpu().numpy()
        batch, num_queries, num_keys = visible.shape
        padded = np.zeros((batch * num_queries, num_keys + 2), bool)
        padded[:, 1:-1] = visible.reshape(batch * num_queries, num_keys)
        query, key = np.nonzero(padded[:, 1:] != padded[:, :-1])
        count = np.bincount(query, minlength=len(padded))
        if (count > 4).any():
            return None
        edges = np.zeros((len(padded), 4), np.int64)
        edges[query, np.arange(len(query)) - (np.cumsum(count) - count)[query]] = key
        edges += np.repeat(np.arange(batch) * num_keys, num_queries)[:, None]
        position = np.tile(np.arange(num_queries), batch)
        return cls(*_intervals(edges[:, :2], edges[:, 2:]), batch * num_keys, _tensor(position), "intervals").to(device)

    @classmethod
    def _one_interval(cls, start: _Ints, end: _Ints, document_start: _Ints, kind: Kind, size: int, device: torch.device) -> DiffusionMask:
        intervals = _intervals(np.stack([start, end], 1), np.repeat(end[:, None], 2, 1))
        return cls(*intervals, len(start), _tensor(np.arange(len(start)) - document_start), kind, size).to(device)

    @property
    def num_queries(self) -> int:
        """Number of queries Tq."""
        return self.context.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.context.device

    def dense(self) -> Tensor:
        """bool [Tq, Tk], True where the query sees the key. The only quadratic thing here: for tests and references.

        For ``cached`` the columns are the cached keys of all rows one after the other, then the new keys.
        """
        visible = self.mask_mod()
        query = torch.arange(self.num_queries, device=self.device)[:, None]
        key = torch.arange(self.num_keys + self._num_cached(), device=self.device)[None, :]
        return visible(None, None, query, key)

    def mask_mod(self) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
        """The mask as FlexAttention's ``mask_mod(batch, head, query, key)``; columns as in :meth:`dense`."""
        context, own = self.context, self.own
        if self.context_lens is not None and self.query_lens is not None:
            before = torch.cumsum(self.context_lens, 0) - self.context_lens
            context = context + torch.repeat_interleave(before, self.query_lens.long())[:, None]
            own = own + self._num_cached()

        def visible(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
            in_context = (key >= context[query, 0]) & (key < context[query, 1])
            return in_context | ((key >= own[query, 0]) & (key < own[query, 1]))

        return visible

    def visible_pairs(self) -> int:
        """Number of (query, key) pairs that see each other: 4 * D * Hq FLOPs each in the forward."""
        return int(sum((i[:, 1] - i[:, 0]).sum(dtype=torch.int64) for i in (self.context, self.own)))

    def tile_plan(self, block_m: int = BLOCK_M, block_n: int = BLOCK_N) -> TilePlan:
        """The tiles that a kernel visits, on the mask's device; computed on the host once and kept.

        The plan of the default sizes exists from the start. Another one must be built before a compiled function asks for it.

        Args:
            block_m: most queries in a tile.
            block_n: keys in a tile of the key-stationary half.

        Raises:
            ValueError: a size is below 1.
        """
        plan = self._plans.get((block_m, block_n))
        if plan is None:
            _positive("block_m", block_m), _positive("block_n", block_n)
            rows = None if self.cu_query_lens is None else self.cu_query_lens.cpu().numpy().astype(np.int64)
            context, own = self._host_intervals()
            with torch.inference_mode(False):  # as the mask's own tensors
                plan = build_plan(context, own, rows, self.num_keys, block_m, block_n).to(self.device)
            self._plans[block_m, block_n] = plan
        return plan

    def key_plan(self, block_n: int = GPU_BLOCK_N) -> KeyPlan:
        """The stretches of queries that see each tile of ``block_n`` keys, on the mask's device; computed on the host once and kept.

        Raises:
            ValueError: ``block_n`` is below 1, or a ``cached`` mask.
        """
        plan = self._key_plans.get(block_n)
        if plan is None:
            _positive("block_n", block_n)
            if self.kind == "cached":
                raise ValueError("mask: expected a mask without a cache: the keys of a cache are not planned")
            context, own = self._host_intervals()
            with torch.inference_mode(False):
                tiles = build_plan(context, own, None, self.num_keys, BLOCK_M, BLOCK_N).tiles.numpy()
                plan = build_key_plan(context, own, tiles, self.num_keys, block_n).to(self.device)
            self._key_plans[block_n] = plan
        return plan

    def _plan_for_gpu(self) -> None:
        """Build the plans that kernels for a GPU ask for."""
        for block_m in GPU_BLOCK_M:
            self.tile_plan(block_m)
        if self.kind != "cached":
            self.key_plan()

    def first_queries(self, count: int) -> DiffusionMask:
        """The same mask for the first ``count`` queries only, over all keys; made once and kept.

        The last layer of a training step needs it: nothing reads what the clean copy's tokens become there.

        Raises:
            ValueError: more queries than there are, fewer than 0, or a ``cached`` mask, whose rows hold their own queries.
        """
        if self.kind == "cached" or not 0 <= count <= self.num_queries:
            raise ValueError(f"count: expected 0 to {self.num_queries} queries of a mask without a cache, got {count} ({self.kind})")
        if count not in self._parts:
            kept = (self.context[:count], self.own[:count], self.num_keys, self.position_ids[:count], "intervals")
            context, own = self._host_intervals()
            host = (context[:count], own[:count])
            self._parts[count] = DiffusionMask(*kept, block_size=self.block_size, _host=host)  # type: ignore[arg-type]
        return self._parts[count]

    def to(self, device: torch.device | str) -> DiffusionMask:
        """The same mask, with the plans built so far, on ``device``."""
        target = torch.empty(0, device=device).device
        if target == self.device:
            return self
        if target.type == "cuda":
            self._plan_for_gpu()
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        with torch.inference_mode(False):
            moved: dict[str, Any] = {name: moved_to(value, target) for name, value in tensors.items()}
            plans: dict[str, Any] = {
                name: {sizes: plan.to(target) for sizes, plan in getattr(self, name).items()} for name in ("_plans", "_key_plans")
            }
            return replace(self, **moved, **plans, _parts={}, _host=self._host_intervals())

    def _host_intervals(self) -> tuple[_Int32s, _Int32s]:
        return self._host or (self.context.cpu().numpy(), self.own.cpu().numpy())

    def _num_cached(self) -> int:
        return 0 if self.context_lens is None else int(self.context_lens.sum())


def block_ids(cu_seqlens: Lengths, block_size: int, block_origin: BlockOrigin = "document") -> Tensor:
    """int64 [L], the block of each token of a pack, counted through all documents: the order of ``noisy_blocks``.

    Arguments and errors as :meth:`DiffusionMask.block_diffusion`.
    """
    cu, device = _cu_seqlens(cu_seqlens, None)
    return moved_to(_tensor(_blocks(cu, _positive("block_size", block_size), block_origin)[0]), device)


def _documents(cu: _Ints) -> tuple[_Ints, _Ints]:
    """Start and end of each token's document."""
    lengths = np.diff(cu)
    return np.repeat(cu[:-1], lengths), np.repeat(cu[1:], lengths)


def _blocks(cu: _Ints, size: int, origin: str) -> tuple[_Ints, _Ints, _Ints]:
    """Number, start and end of each token's block."""
    if origin not in ("document", "row"):
        raise ValueError(f"block_origin: expected 'document' or 'row', got {origin!r}")
    document_start, document_end = _documents(cu)
    zero = document_start if origin == "document" else np.zeros_like(document_start)
    index = np.arange(len(zero))
    begin = zero + (index - zero) // size * size
    start, end = np.maximum(begin, document_start), np.minimum(begin + size, document_end)
    return np.cumsum(index == start) - 1, start, end


def _intervals(context: _Ints, own: _Ints) -> tuple[Tensor, Tensor]:
    return _tensor(context.astype(np.int32)), _tensor(own.astype(np.int32))


def _tensor(values: npt.NDArray[Any]) -> Tensor:
    """On the host, where a mask is made and planned: it goes to the device of its lengths when it is whole, and is not read back."""
    with torch.inference_mode(False):  # a mask made during inference may be kept and trained with later
        return torch.from_numpy(values)


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)


def _host_array(name: str, values: Any) -> tuple[npt.NDArray[Any], torch.device]:
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy(), values.device
    try:
        return np.asarray(values), torch.device("cpu")
    except ValueError:
        raise ValueError(f"{name}: expected a 1-D sequence, got a ragged one") from None


def _integers(name: str, values: Lengths) -> tuple[_Ints, torch.device]:
    array, device = _host_array(name, values)
    if array.size == 0 and array.dtype == np.float64 and not isinstance(values, (Tensor, np.ndarray)):
        array = array.astype(np.int64)  # an empty list has no dtype of its own
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name}: expected 1-D integers, got {array.dtype} of shape {list(array.shape)}")
    return array.astype(np.int64), device


def _bools(name: str, values: Any, length: int) -> npt.NDArray[np.bool_]:
    array, _ = _host_array(name, values)
    if array.size == 0 and length == 0:
        return np.zeros(0, bool)
    if array.dtype != np.bool_ or array.shape != (length,):
        raise ValueError(f"{name}: expected bool [{length}], one per block, got {array.dtype} of shape {list(array.shape)}")
    return array


def _cu_seqlens(cu_seqlens: Lengths, num_tokens: int | None) -> tuple[_Ints, torch.device]:
    cu, device = _integers("cu_seqlens", cu_seqlens)
    if len(cu) == 0 or cu[0] != 0:
        raise ValueError(f"cu_seqlens: expected to start at 0, got {cu[:1].tolist()}")
    if (np.diff(cu) < 0).any():
        at = int(np.flatnonzero(np.diff(cu) < 0)[0])
        raise ValueError(f"cu_seqlens: expected values that never fall, got {int(cu[at])} then {int(cu[at + 1])} at index {at + 1}")
    if cu[-1] >= 2**31:
        raise ValueError(f"cu_seqlens: expected fewer than 2^31 tokens, got {int(cu[-1])}")
    if num_tokens is not None and cu[-1] != num_tokens:
        raise ValueError(f"cu_seqlens: expected to end at the number of tokens {num_tokens}, got {int(cu[-1])}")
    return cu, device
