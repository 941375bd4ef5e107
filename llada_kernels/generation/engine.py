"""Batched block-wise generation, one forward per step for all rows: the cached engine and the whole-window engine.

Rows are independent: they may join at any time, be at different blocks, and leave as soon as they are finished. What a
row generates and how many forwards it needs do not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .._tile_plan import moved_to
from ..masks import DiffusionMask
from .kv_cache import KVCache
from .output import OnStep
from .rules import DecodingRule, Unprojected, is_eos, put_rows, take_rows

__all__ = ["Engine", "Finished", "GenerationModel", "WindowEngine", "engine_for"]


class GenerationModel(Protocol):
    """What generation needs to know of a model.

    ``config`` has vocab_size, and for a cache num_hidden_layers, num_key_value_heads and head_dim. ``forward`` takes packed
    ``input_ids`` int64 [T], ``mask`` (a DiffusionMask, whose position ids hold), ``cache`` (a KVCache or None) and
    ``logits_to_keep`` int64 [N], and returns an object whose ``logits`` are [N, V] at those packed tokens.

    A model may also have ``plain_lm_head``, True if these logits are nothing but ``backbone(input_ids, mask=, cache=)`` [T, H] at
    these tokens times ``lm_head_weight`` [V, H]: greedy rules then choose tokens without logits (see :func:`lm_head_unmask`).
    """

    config: Any

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def forward(self, input_ids: Tensor, *, mask: Any, cache: Any, logits_to_keep: Tensor) -> Any: ...


class Finished(NamedTuple):
    """A row that is done: the number that :meth:`Engine.add` gave it, its new tokens through the first EOS, its forwards."""

    row: int
    tokens: Tensor
    num_forwards: int


@dataclass
class _Row:
    """Host-side bookkeeping of the row in a slot."""

    row: int
    prompt_length: int
    end: int
    start: int
    seed: int
    forwards: int = 0
    steps: int = 0
    fresh: bool = True
    needs: int | None = None  # positions whose logits the next step reads; None at the first of a block: not known yet


class Engine:
    """Block-causal decoding from a KV cache, for rules with ``whole_window = False``.

    A row's forward covers all that is not in its cache up to the end of its current block. So the first forward of the
    first block carries the prompt's whole blocks, and that of every later block the finished block before it: their keys
    and values are committed from a forward that is needed anyway, and the count of forwards is that of the uncached loop.
    The LM head runs on the positions that the rule reads, no others. What a step found comes back from the device in one copy, together
    with what the next step needs to know; only where a block begins or ends is more read back.

    Precision: that of the model; decisions are made on its logits.
    Determinism: rows do not depend on each other; random numbers are keyed by (seed, position, forward of the row).

    Args:
        model: see :class:`GenerationModel`.
        rule: a bound decoding rule (see ``DecodingRule.bind``), the same for all rows.
        block_length: tokens per block.
        num_slots: rows held at once.
        max_tokens: most tokens of a row, prompt included.
        on_step: called after every step with (row, block_start, tokens of the block on the CPU).

    Raises:
        ValueError: the rule is for the other engine, or a size is below 1.
    """

    whole_window = False

    def __init__(
        self,
        model: GenerationModel,
        rule: DecodingRule,
        block_length: int,
        num_slots: int,
        max_tokens: int,
        on_step: OnStep | None = None,
    ) -> None:
        if rule.whole_window != self.whole_window:
            raise ValueError(f"rule: expected one with whole_window={self.whole_window}, got {rule}")
        for name, size in (("block_length", block_length), ("num_slots", num_slots), ("max_tokens", max_tokens)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.model, self.rule, self.block_length, self.on_step = model, rule, block_length, on_step
        width = -(-max_tokens // block_length) * block_length
        self._tokens = torch.full((num_slots, width), _mask_id(rule), dtype=torch.int64, device=model.device)
        self._rows: list[_Row | None] = [None] * num_slots
        self._state: Any = None
        self._added = 0
        self._within = torch.arange(block_length, device=model.device)
        self._allocate(num_slots, width)

    @property
    def num_rows(self) -> int:
        """Rows that are being generated."""
        return sum(row is not None for row in self._rows)

    @property
    def num_free_slots(self) -> int:
        """Rows that can be added now."""
        return len(self._rows) - self.num_rows

    def add(self, prompt: Tensor, gen_length: int, seed: int = 0) -> int:
        """Begin a row and return its number, counted from 0 in the order of adding.

        Args:
            prompt: int64 [n], n of at least 1.
            gen_length: tokens to generate at most.
            seed: of the row's random numbers.

        Raises:
            ValueError: the row is too long or empty, or no slot is free.
        """
        length, end = len(prompt), len(prompt) + gen_length
        if length < 1 or gen_length < 1:
            raise ValueError(f"prompt, gen_length: expected at least one token each, got {length} and {gen_length}")
        if end > self._tokens.shape[1]:
            raise ValueError(f"gen_length: expected at most {self._tokens.shape[1]} tokens with the prompt, got {end}")
        if not self.num_free_slots:
            raise ValueError(f"add: all {len(self._rows)} slots are taken")
        slot = self._rows.index(None)
        self._tokens[slot] = _mask_id(self.rule)
        self._tokens[slot, :length] = prompt
        self._rows[slot] = _Row(self._added, length, end, self._first_block(length), seed)
        self._added += 1
        return self._added - 1

    @torch.no_grad()
    def step(self) -> list[Finished]:
        """One forward and one step of the rule for every row; returns the rows that are finished, which leave.

        Raises:
            ValueError: the model's logits hold NaN, +inf or nothing finite: names the row by its number and the position in it.
            RuntimeError: the rule does not finish a block within its own bound of steps.
        """
        active = [slot for slot, row in enumerate(self._rows) if row is not None]
        if not active:
            return []
        rows = [row for row in self._rows if row is not None]
        chosen = slice(None) if len(active) == len(self._rows) else self._index(active)
        columns = self._index([row.start for row in rows])[:, None] + self._within
        blocks = self._tokens[chosen].gather(1, columns)
        self._begin_blocks(active, rows, blocks, columns)
        state = take_rows(self._state, chosen)
        index, kept = self._positions_needed(rows, blocks, state)
        logits = self._logits(active, rows, kept)
        try:
            new, state, done = self.rule.step(logits, blocks, state, index)
        except ValueError as error:
            # The sampler counts rows and positions of what it was given, which means nothing to the caller.
            if (named := self._bad_logits(logits, rows, kept)) is None:
                raise
            raise named from error
        put_rows(self._state, chosen, state)
        self._tokens[chosen] = self._tokens[chosen].scatter(1, columns, new)
        if self.on_step is not None:
            shown = new.cpu()
            for i, row in enumerate(rows):
                self.on_step(row.row, row.start, shown[i])
        found = torch.stack([done.long(), self.rule.failed(state).long(), self.rule.needed(new, state).sum(1)])
        ends, failed, needs = found.tolist()
        for row, count in zip(rows, needs, strict=True):
            row.needs = count
        if any(failed):
            bad = [row.row for row, fail in zip(rows, failed, strict=True) if fail]
            general = ValueError(f"logits: expected finite numbers, got NaN, +inf or nothing finite in rows {bad}")
            raise self._bad_logits(logits, rows, kept) or general
        return [f for slot, row, end in zip(active, rows, ends, strict=True) if (f := self._advance(slot, row, bool(end)))]

    def _bad_logits(self, logits: Tensor | Unprojected, rows: list[_Row], kept: Tensor) -> ValueError | None:
        """The first position that no token can be chosen at, as the caller counts; None if ``logits`` [R, n, V] are sound."""
        if isinstance(logits, Unprojected):
            logits = logits.logits()
        others = torch.arange(logits.shape[-1], device=logits.device) != _mask_id(self.rule)
        wrong = {
            "NaN": logits.isnan().any(-1),
            "+inf": (logits == torch.inf).any(-1),
            "no finite logit besides the mask token's": ~(logits.isfinite() & others).any(-1),
        }
        found = torch.stack(list(wrong.values())).any(0).nonzero().tolist()
        if not found:
            return None
        i, j = found[0]
        got = next(text for text, where in wrong.items() if where[i, j])
        at = f"row {rows[i].row}, position {rows[i].start + int(kept[i, j])} (prompt of {rows[i].prompt_length} tokens included)"
        return ValueError(f"logits: expected finite numbers, got {got} in {at}")

    def _begin_blocks(self, active: list[int], rows: list[_Row], blocks: Tensor, columns: Tensor) -> None:
        """Fresh state for the rows that are at the first forward of a block."""
        fresh = [i for i, row in enumerate(rows) if row.fresh]
        if not fresh:
            return
        here = self._index(fresh)
        state = self.rule.begin_block(
            blocks[here], columns[here], self._index([rows[i].seed for i in fresh]), self._index([rows[i].forwards for i in fresh])
        )
        if self._state is None:
            self._state = type(state)(*(x.new_zeros(len(self._rows), *x.shape[1:]) for x in state))
        put_rows(self._state, self._index([active[i] for i in fresh]), state)
        for i in fresh:
            rows[i].fresh = False

    def _positions_needed(self, rows: list[_Row], blocks: Tensor, state: Any) -> tuple[Tensor | None, Tensor]:
        """The positions of the block whose logits the rule gets: int64 [R, n] or None for all L, and spelled out [R, n].

        Every row gets as many as the row that needs most: those it needs first, in order, then any others.
        """
        needed = self.rule.needed(blocks, state)
        known = [row.needs for row in rows if row.needs is not None]
        most = max(1, *known) if len(known) == len(rows) else max(1, int(needed.sum(1).max()))
        if most == self.block_length:
            return None, self._within.expand(len(blocks), -1)
        index = (~needed).byte().argsort(dim=1, stable=True)[:, :most]
        return index, index

    def _advance(self, slot: int, row: _Row, done: bool) -> Finished | None:
        """Count the step; after a finished block go to the next one, or end the row."""
        row.forwards += 1
        row.steps += 1
        if not done:
            if row.steps >= self.rule.max_steps(self.block_length):
                raise RuntimeError(f"{self.rule} has not finished a block within its {row.steps} steps")
            return None
        after = row.start + self.block_length
        if after < row.end and not self.rule.stop_after_block(self._tokens[slot, row.prompt_length : after]):
            row.start, row.steps, row.fresh, row.needs = after, 0, True, None
            return None
        tokens = _through_first(self._tokens[slot, row.prompt_length : row.end], self.rule)
        self._rows[slot] = None
        self._release(slot)
        return Finished(row.row, tokens, row.forwards)

    def _index(self, values: Sequence[int]) -> Tensor:
        return moved_to(torch.tensor(values, dtype=torch.int64), self._tokens.device)

    # What a whole-window engine does differently.

    def _allocate(self, num_slots: int, width: int) -> None:
        config = self.model.config
        without_logits = getattr(self.rule, "takes_hidden", False) and getattr(self.model, "plain_lm_head", False)
        self._model_with_head: Any = self.model if without_logits else None
        self.cache = KVCache(
            config.num_hidden_layers,
            num_slots,
            width,
            self.block_length,
            config.num_key_value_heads,
            config.head_dim,
            self.model.dtype,
            self.model.device,
        )

    def _first_block(self, prompt_length: int) -> int:
        """Blocks are counted from the row's start: the first one may hold the prompt's tail."""
        return prompt_length // self.block_length * self.block_length

    def _logits(self, active: list[int], rows: list[_Row], kept: Tensor) -> Tensor | Unprojected:
        """Logits [R, n, V] of the positions ``kept`` int64 [R, n] of each row's block; commits what comes before the block."""
        query_lens, commits = [0] * len(self._rows), [0] * len(self._rows)
        pieces, block_begins, packed = [], [], 0
        for slot, row in zip(active, rows, strict=True):
            cached, end = self.cache.context_lens[slot], row.start + self.block_length
            pieces.append(self._tokens[slot, cached:end])
            query_lens[slot], commits[slot] = end - cached, row.start - cached
            packed += end - cached
            block_begins.append(packed - self.block_length)
        keep = (self._index(block_begins)[:, None] + kept).flatten()
        mask = self.cache.mask(query_lens)
        tokens = torch.cat(pieces)
        logits: Tensor | Unprojected
        with torch.inference_mode():  # under no_grad alone, ops that have a gradient pass through Python code of torch.library
            if self._model_with_head is None:
                logits = self.model.forward(tokens, mask=mask, cache=self.cache, logits_to_keep=keep).logits.view(*kept.shape, -1)
            else:
                hidden = self._model_with_head.backbone(tokens, mask=mask, cache=self.cache)[keep]
                logits = Unprojected(hidden.view(*kept.shape, -1), self._model_with_head.lm_head_weight)
        self.cache.commit(commits)
        return logits

    def _release(self, slot: int) -> None:
        self.cache.free(slot)


class WindowEngine(Engine):
    """Whole-window decoding without a cache, for rules with ``whole_window = True``.

    Every forward sees the whole row, its future masks included, bidirectionally; blocks are counted from the end of the
    prompt. With guidance each row is in the forward twice, the second time with its prompt masked.
    """

    whole_window = True

    def _allocate(self, num_slots: int, width: int) -> None:
        pass

    def _first_block(self, prompt_length: int) -> int:
        return prompt_length

    def _logits(self, active: list[int], rows: list[_Row], kept: Tensor) -> Tensor:
        scale = self.rule.cfg_scale
        pieces = [self._tokens[slot, : row.end] for slot, row in zip(active, rows, strict=True)]
        starts = [row.start for row in rows]
        if scale > 0.0:
            for piece, row in zip(list(pieces), rows, strict=True):
                unconditional = piece.clone()
                unconditional[: row.prompt_length] = _mask_id(self.rule)
                pieces.append(unconditional)
            starts, kept = starts * 2, kept.repeat(2, 1)
        cu_seqlens = torch.tensor([0] + [len(piece) for piece in pieces]).cumsum(0)
        begins = moved_to(cu_seqlens[:-1], kept.device) + self._index(starts)
        mask = DiffusionMask.bidirectional(cu_seqlens).to(kept.device)
        keep = (begins[:, None] + kept).flatten()
        logits: Tensor = self.model.forward(torch.cat(pieces), mask=mask, cache=None, logits_to_keep=keep).logits
        if scale > 0.0:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (scale + 1.0) * (conditional - unconditional)
        return logits.view(len(rows), -1, logits.shape[-1])

    def _release(self, slot: int) -> None:
        pass


def engine_for(rule: DecodingRule) -> type[Engine]:
    """The class of engine that a rule needs."""
    return WindowEngine if rule.whole_window else Engine


def _mask_id(rule: Any) -> int:
    if rule.mask_id is None or rule.eos_id is None:
        raise ValueError(f"rule: expected one with mask_id and eos_id (see DecodingRule.bind), got {rule}")
    return int(rule.mask_id)


def _through_first(tokens: Tensor, rule: Any) -> Tensor:
    """A copy of the tokens through the first EOS."""
    found = is_eos(tokens, rule.eos_id).nonzero()
    return tokens[: int(found[0]) + 1].clone() if len(found) else tokens.clone()
