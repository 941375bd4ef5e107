"""Decoding rules: which positions of a block take which token after a forward, and when the block is finished.

A rule is a frozen dataclass. Everything that changes from step to step is in a state: a NamedTuple of tensors with one
entry per row, which the engine gathers and scatters without knowing its fields. So rows at different blocks and steps
share one call, and a row's result cannot depend on the batch it is in.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .._field_types import check_field_types
from ..ops.lm_head_unmask import lm_head_unmask
from ..ops.threshold_unmask import threshold_unmask
from ..ops.threshold_unmask.reference import philox_uniform

__all__ = ["BlockState", "DecodingRule", "EosIds", "LLaDA20", "LLaDA21", "LowConfidence", "Unprojected", "is_eos", "put_rows", "take_rows"]

RuleT = TypeVar("RuleT", bound="DecodingRule")

EosIds = int | tuple[int, ...]
"""The id that ends a row, or several any of which does."""


def is_eos(tokens: Tensor, eos_id: EosIds) -> Tensor:
    """bool, shape of tokens."""
    if isinstance(eos_id, int):
        return tokens == eos_id
    return functools.reduce(operator.or_, [tokens == i for i in eos_id])


class Unprojected(NamedTuple):
    """Logits that need not exist: final hidden states [R, n, H] and the LM head [V, H] that would make logits of them."""

    hidden: Tensor
    lm_head: Tensor

    def logits(self) -> Tensor:
        """[R, n, V], dtype of the hidden states."""
        return torch.nn.functional.linear(self.hidden, self.lm_head)


class BlockState(NamedTuple):
    """What the rules of this file keep per row while a block is denoised.

    Attributes:
        editable: bool [R, L], positions that were masked when the block began: all but the prompt's.
        positions: int64 [R, L], absolute positions (of the random numbers' key).
        seed: int64 [R].
        forward_index: int64 [R], forwards of the row before this one, counted over all of its blocks.
        step: int64 [R], forwards spent in this block.
        post: int64 [R], forwards spent in this block after its last mask was gone.
        bad: bool [R], rows whose last logits the sampler could not use (it raises by itself only where that costs no sync).
    """

    editable: Tensor
    positions: Tensor
    seed: Tensor
    forward_index: Tensor
    step: Tensor
    post: Tensor
    bad: Tensor


class DecodingRule(Protocol):
    """The interface of every decoding rule; L is the block length.

    Attributes:
        whole_window: False: block-causal decoding from a KV cache, blocks counted from the row's start. True: every
            forward sees the whole row, masks included, and blocks are counted from the end of the prompt.
        mask_id, eos_id: token ids (``eos_id`` perhaps a tuple of them), None before :meth:`bind`.
        cfg_scale: strength of classifier-free guidance (whole-window rules only), 0 for none.
    """

    whole_window: ClassVar[bool]

    @property
    def mask_id(self) -> int | None: ...
    @property
    def eos_id(self) -> EosIds | None: ...
    @property
    def cfg_scale(self) -> float: ...

    @property
    def needs_seed(self) -> bool:
        """Whether the result depends on the seed."""
        ...

    @property
    def takes_hidden(self) -> bool:
        """Whether :meth:`step` serves an :class:`Unprojected` as well, which spares it the logits."""
        ...

    def bind(self: RuleT, *, mask_id: int, eos_id: EosIds, gen_length: int, block_length: int) -> RuleT:
        """The rule with its ids and everything that depends on the lengths filled in."""
        ...

    def max_steps(self, block_length: int) -> int:
        """A bound of the forwards that one block can take."""
        ...

    def begin_block(self, tokens: Tensor, positions: Tensor, seed: Tensor, forward_index: Tensor) -> Any:
        """State at the start of a block: tokens int64 [R, L] as the first forward will see them."""
        ...

    def needed(self, tokens: Tensor, state: Any) -> Tensor:
        """bool [R, L]: the positions whose logits the next step reads."""
        ...

    def step(self, logits: Any, tokens: Tensor, state: Any, index: Tensor | None = None) -> tuple[Tensor, Any, Tensor]:
        """One step: logits [R, n, V] of the positions ``index`` int64 [R, n] (None: all L) -> tokens, state, done bool [R].

        ``logits`` is a Tensor, or where the rule says ``takes_hidden`` perhaps an :class:`Unprojected`.
        """
        ...

    def failed(self, state: Any) -> Tensor:
        """bool [R]: rows whose last logits held NaN, +inf or nothing finite."""
        ...

    def stop_after_block(self, tokens: Tensor) -> bool:
        """Whether a row ends after a finished block: tokens int64 [n], all that it has generated, prompt excluded."""
        ...


def take_rows(state: Any, rows: Tensor | slice) -> Any:
    """The state of some rows."""
    return type(state)(*(x[rows] for x in state))


def put_rows(state: Any, rows: Tensor | slice, new: Any) -> None:
    """Overwrite the state of some rows in place."""
    for x, y in zip(state, new, strict=True):
        x[rows] = y


@dataclass(frozen=True)
class _Rule:
    """Sampling parameters, token ids and the parts that the rules of this file share."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    mask_id: int | None = None
    eos_id: EosIds | None = None

    whole_window: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_field_types(self)
        _check(0.0 <= self.temperature < float("inf"), "temperature", "a finite number of at least 0", self.temperature)
        _check(self.top_k is None or self.top_k >= 0, "top_k", "None or at least 0 (0 is off)", self.top_k)
        _check(self.top_p is None or 0.0 < self.top_p <= 1.0, "top_p", "None or a number in (0, 1]", self.top_p)

    @property
    def cfg_scale(self) -> float:
        """No guidance."""
        return 0.0

    @property
    def needs_seed(self) -> bool:
        """Whether the result depends on the seed."""
        return self.temperature > 0.0

    @property
    def takes_hidden(self) -> bool:
        """Greedy choices need no logits; drawing does."""
        return self.temperature == 0.0

    def bind(self: RuleT, *, mask_id: int, eos_id: EosIds, gen_length: int, block_length: int) -> RuleT:
        """The rule with these ids."""
        bound: Any = self
        return replace(bound, mask_id=mask_id, eos_id=eos_id)

    def begin_block(self, tokens: Tensor, positions: Tensor, seed: Tensor, forward_index: Tensor) -> BlockState:
        """State at the start of a block (see :class:`DecodingRule`)."""
        zero = torch.zeros_like(forward_index)
        return BlockState(self._masked(tokens), positions, seed, forward_index, zero, zero, zero.bool())

    def needed(self, tokens: Tensor, state: BlockState) -> Tensor:
        """Only masked positions are read."""
        return self._masked(tokens)

    def failed(self, state: BlockState) -> Tensor:
        """Rows that the sampler marked."""
        return state.bad

    def stop_after_block(self, tokens: Tensor) -> bool:
        """A row ends with the block that contains its first EOS: all that would follow is cut off."""
        return bool(self._is_eos(tokens).any())

    def _masked(self, tokens: Tensor) -> Tensor:
        assert self.mask_id is not None
        return tokens == self.mask_id

    def _is_eos(self, tokens: Tensor) -> Tensor:
        assert self.eos_id is not None
        return is_eos(tokens, self.eos_id)

    def _unmask(
        self,
        logits: Tensor | Unprojected,
        tokens: Tensor,
        state: BlockState,
        index: Tensor | None,
        threshold: float,
        min_unmask: int | Tensor,
        editing_threshold: float | None = None,
    ) -> tuple[Tensor, BlockState]:
        """tokens after :func:`threshold_unmask` or :func:`lm_head_unmask` on the positions ``index``, and the state after this forward."""
        positions, editable, part = state.positions, state.editable, tokens
        if index is not None:
            positions, editable, part = positions.gather(1, index), editable.gather(1, index), part.gather(1, index)
        assert self.mask_id is not None
        rules: tuple[Any, ...] = (part, self.mask_id, threshold, editing_threshold, min_unmask, self.temperature, self.top_k, self.top_p)
        keys: dict[str, Any] = {"editable": editable, "positions": positions, "forward_index": state.forward_index}
        keys["seed"] = state.seed if self.temperature > 0.0 else None
        if isinstance(logits, Unprojected):
            new, _, counts = lm_head_unmask(*logits, *rules, **keys)
        else:
            new, _, counts = threshold_unmask(logits, *rules, **keys)
        after = state._replace(step=state.step + 1, forward_index=state.forward_index + 1, bad=counts[:, 0] < 0)
        return (new if index is None else tokens.scatter(1, index, new)), after


@dataclass(frozen=True)
class LLaDA20(_Rule):
    """LLaDA2.0: each step unmasks every position whose confidence exceeds the threshold, at least a scheduled number.

    The schedule spreads block_length over ``min(steps, gen_length // minimal_topk)`` steps, the remainder over the first
    ones, so a block is always finished within its steps.

    Args:
        threshold: confidence above which a position is unmasked, in [0, 1].
        steps: denoising steps per block.
        minimal_topk: tokens that a step unmasks at least, as far as it limits ``steps``.
        eos_early_stop: leave a block as soon as nothing before its first EOS is masked. (The official code looks only after
            steps that write an EOS, so it needs more forwards for the same tokens.)
        temperature: 0 is greedy; above, tokens are drawn after temperature, top_k and top_p.
        top_k, top_p: filters of the draw, None for none.
        mask_id, eos_id: token ids; None: those of the model. ``eos_id`` may be a tuple of ids, any of which ends a row.
    """

    threshold: float = 0.95
    steps: int = 32
    minimal_topk: int = 1
    eos_early_stop: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_unit("threshold", self.threshold)
        _check(self.steps >= 1, "steps", "at least 1", self.steps)
        _check(self.minimal_topk >= 1, "minimal_topk", "at least 1", self.minimal_topk)

    def bind(self, *, mask_id: int, eos_id: EosIds, gen_length: int, block_length: int) -> LLaDA20:
        """The rule with its ids, and steps limited by gen_length // minimal_topk."""
        _check(
            self.minimal_topk <= gen_length,
            "minimal_topk",
            f"at most gen_length = {gen_length} (gen_length // minimal_topk denoising steps per block)",
            self.minimal_topk,
        )
        return replace(self, mask_id=mask_id, eos_id=eos_id, steps=min(self.steps, gen_length // self.minimal_topk))

    def max_steps(self, block_length: int) -> int:
        """Each of the first steps unmasks at least one position, and the schedule sums to block_length."""
        return min(self.steps, block_length)

    def step(
        self, logits: Tensor | Unprojected, tokens: Tensor, state: BlockState, index: Tensor | None = None
    ) -> tuple[Tensor, BlockState, Tensor]:
        """One step (see :class:`DecodingRule`)."""
        count = _spread(tokens.shape[1], self.steps, state.step)
        new, after = self._unmask(logits, tokens, state, index, self.threshold, count)
        masked = self._masked(new)
        done = ~masked.any(1)
        if self.eos_early_stop:
            is_eos = self._is_eos(new) & state.editable
            first = is_eos & (is_eos.cumsum(1) == 1)
            clear = first & (masked.cumsum(1) == 0)
            done = done | clear.any(1)
        return new, after, done


@dataclass(frozen=True)
class LLaDA21(_Rule):
    """LLaDA2.1: unmasks as LLaDA2.0 does, and in the same forward edits tokens of the block that it would now choose otherwise.

    A block ends with the first forward that finds no mask and changes nothing, or after ``max_post_steps`` forwards
    on a block without masks.

    Args:
        threshold: confidence above which a position is unmasked, in [0, 1].
        editing_threshold: confidence above which a token is replaced by another; None: no editing, 0.0: always.
        max_post_steps: forwards allowed after the last mask of a block is gone.
        num_to_transfer: positions that a step unmasks at least.
        temperature, top_k, top_p, mask_id, eos_id: as in :class:`LLaDA20`.
    """

    threshold: float = 0.95
    editing_threshold: float | None = 0.9
    max_post_steps: int = 16
    num_to_transfer: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_unit("threshold", self.threshold)
        if self.editing_threshold is not None:
            _check_unit("editing_threshold", self.editing_threshold)
        _check(self.max_post_steps >= 0, "max_post_steps", "at least 0", self.max_post_steps)
        _check(self.num_to_transfer >= 1, "num_to_transfer", "at least 1", self.num_to_transfer)

    def max_steps(self, block_length: int) -> int:
        """Until the last mask is gone, and after."""
        return -(-block_length // self.num_to_transfer) + self.max_post_steps

    def needed(self, tokens: Tensor, state: BlockState) -> Tensor:
        """All positions of the block but the prompt's, when there is editing."""
        return state.editable if self.editing_threshold is not None else self._masked(tokens)

    def step(
        self, logits: Tensor | Unprojected, tokens: Tensor, state: BlockState, index: Tensor | None = None
    ) -> tuple[Tensor, BlockState, Tensor]:
        """One step (see :class:`DecodingRule`)."""
        new, after = self._unmask(logits, tokens, state, index, self.threshold, self.num_to_transfer, self.editing_threshold)
        unmasked = ~self._masked(new).any(1)
        post = state.post + unmasked
        done = unmasked & ((post > self.max_post_steps) | (new == tokens).all(1))
        return new, after._replace(post=post), done


@dataclass(frozen=True)
class LowConfidence(_Rule):
    """LLaDA and LLaDA-MoE: semi-autoregressive blocks in a bidirectional window, a fixed number of tokens per step.

    Args:
        steps: denoising steps in all, spread evenly over the blocks.
        remasking: ``"low_confidence"`` keeps the most probable tokens of a step, ``"random"`` random ones.
        cfg_scale: classifier-free guidance: logits = u + (cfg_scale + 1) (c - u), u with a masked prompt; 0 for none.
        num_blocks: set by :meth:`bind`.
        temperature, top_k, top_p, mask_id, eos_id: as in :class:`LLaDA20`.
    """

    steps: int = 128
    remasking: str = "low_confidence"
    cfg_scale: float = 0.0
    num_blocks: int = 1

    whole_window: ClassVar[bool] = True

    @property
    def takes_hidden(self) -> bool:
        """Guidance and the other ways of remasking read whole logits."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.steps >= 1, "steps", "at least 1", self.steps)
        _check(0.0 <= self.cfg_scale < float("inf"), "cfg_scale", "a finite number of at least 0", self.cfg_scale)
        known = ("low_confidence", "random")
        _check(self.remasking in known, "remasking", " or ".join(map(repr, known)), repr(self.remasking))

    @property
    def needs_seed(self) -> bool:
        """Whether the result depends on the seed."""
        return self.temperature > 0.0 or self.remasking == "random"

    def bind(self, *, mask_id: int, eos_id: EosIds, gen_length: int, block_length: int) -> LowConfidence:
        """The rule with its ids and the number of blocks."""
        _check(gen_length % block_length == 0, "gen_length", f"a multiple of block_length = {block_length}", gen_length)
        blocks = gen_length // block_length
        _check(
            self.steps % blocks == 0,
            "steps",
            f"a multiple of the {blocks} blocks (gen_length {gen_length} // block_length {block_length})",
            self.steps,
        )
        return replace(self, mask_id=mask_id, eos_id=eos_id, num_blocks=blocks)

    def max_steps(self, block_length: int) -> int:
        """The block's share of the steps."""
        return min(self.steps // self.num_blocks, block_length)

    def step(self, logits: Tensor, tokens: Tensor, state: BlockState, index: Tensor | None = None) -> tuple[Tensor, BlockState, Tensor]:
        """One step (see :class:`DecodingRule`)."""
        length = tokens.shape[1]
        count = _spread(length, self.steps // self.num_blocks, state.step)
        if self.needs_seed:
            drawn, after = self._unmask(logits, torch.full_like(tokens, self.mask_id or 0), state, index, 0.0, length)
            new = self._keep_best(logits, tokens, drawn, state, index, count)
        else:
            new, after = self._unmask(logits, tokens, state, index, 1.0, count)
        return new, after, ~self._masked(new).any(1)

    def _keep_best(self, logits: Tensor, tokens: Tensor, drawn: Tensor, state: BlockState, index: Tensor | None, count: Tensor) -> Tensor:
        """Write the drawn tokens at the ``count`` masked positions of highest score.

        The official order: a token is drawn after temperature, but ranked by its probability before it.
        """
        masked = self._masked(tokens)
        if self.remasking == "random":
            # The complement keeps these numbers apart from the ones that draw the tokens.
            forward = ~state.forward_index[:, None].expand_as(tokens)
            score = philox_uniform(state.seed[:, None].expand_as(tokens), state.positions, forward)
        else:
            part = drawn if index is None else drawn.gather(1, index)
            chosen = logits.float().softmax(-1).gather(-1, part[..., None])[..., 0]
            score = chosen if index is None else torch.zeros_like(tokens, dtype=chosen.dtype).scatter(1, index, chosen)
        ranked = score.masked_fill(~masked, -1.0).argsort(dim=1, descending=True, stable=True).argsort(1)
        return torch.where(masked & (ranked < count[:, None]), drawn, tokens)


def _spread(total: int, steps: int, step: Tensor) -> Tensor:
    """int64 [R]: the share of the given steps when ``total`` is spread evenly, the remainder over the first ones."""
    return total // steps + (step < total % steps).long()


def _check(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _check_unit(name: str, value: float) -> None:
    _check(0.0 <= value <= 1.0, name, "a number in [0, 1]", value)
