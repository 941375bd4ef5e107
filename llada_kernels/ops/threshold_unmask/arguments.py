"""Arguments and results that :func:`threshold_unmask` and :func:`lm_head_unmask` have in common."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import _disable_current_modes

from .._common import check_same, check_shape, check_tensor

PerRow = float | int | Sequence[float] | Sequence[int] | Tensor


class Unmasked(NamedTuple):
    """What :func:`threshold_unmask` returns.

    Attributes:
        tokens: [R, L] int64: the tokens after the step.
        confidence: [R, L] fp32: confidence in the chosen token of *every* position.
        counts: [R, 2] int32: how many positions were unmasked and how many edited; (-1, -1) marks a
            row with bad logits where raising would cost a synchronisation (GPU, torch.compile).
    """

    tokens: Tensor
    confidence: Tensor
    counts: Tensor


class Rules(NamedTuple):
    """What a backend decides by, checked and contiguous; None is off. Not to be written to: calls share some of it."""

    tokens: Tensor  # [R, L] int64
    mask_token_id: int
    threshold: Tensor  # [R] fp32
    editing_threshold: Tensor | None  # [R] fp32, off where below 0
    min_unmask: Tensor  # [R] int64
    temperature: Tensor | None  # [R] fp64; None is 0 everywhere, and what only drawing needs is None as well
    top_k: Tensor | None  # [R] int64
    top_p: Tensor | None  # [R] fp64
    seed: Tensor | None  # [R] int64
    editable: Tensor | None  # [R, L] bool
    positions: Tensor | None  # [R, L] int64
    forward_index: Tensor | None  # [R] int64

    def greedy(self) -> tuple[Tensor, int, Tensor, Tensor | None, Tensor, Tensor | None]:
        """Those of temperature 0."""
        return self.tokens, self.mask_token_id, self.threshold, self.editing_threshold, self.min_unmask, self.editable


def rule_arguments(
    name: str,
    x: Tensor,
    vocab: int,
    tokens: Tensor,
    mask_token_id: int,
    threshold: PerRow,
    editing_threshold: PerRow | None,
    min_unmask: PerRow,
    temperature: PerRow,
    top_k: PerRow | None,
    top_p: PerRow | None,
    seed: PerRow | None,
    editable: Tensor | None,
    positions: Tensor | None,
    forward_index: PerRow,
) -> Rules:
    """The checked arguments of a backend behind ``x`` [R, L, ...], the tensor called ``name``."""
    rows, length, _ = x.shape
    check_tensor("tokens", tokens, 2, (torch.int64,))
    check_shape("tokens", tokens, rows, length)
    check_same("tokens", tokens, name, x, dtype=False)
    if type(mask_token_id) is not int:
        mask_token_id = _id(mask_token_id)
    if not 0 <= mask_token_id < vocab:
        raise ValueError(f"mask_token_id: expected an id in [0, {vocab}), got {mask_token_id}")
    if vocab < 2:
        raise ValueError(f"{name}: expected at least 2 ids in the vocabulary, got {vocab}")
    for other, y, dtype in (("editable", editable, torch.bool), ("positions", positions, torch.int64)):
        if y is not None:
            check_tensor(other, y, 2, (dtype,))
            check_shape(other, y, rows, length)
            check_same(other, y, name, x, dtype=False)

    draw = None if _is_number(temperature, 0) else (temperature, top_k, top_p, seed, forward_index)
    # A GPU's could belong to a graph that is being captured.
    keep = draw is None and type(x) is Tensor and x.is_cpu and not is_dynamo_compiling()
    if keep and _PLAIN.issuperset(map(type, (threshold, editing_threshold, min_unmask))):
        *numbers, last = _kept_numbers(rows, threshold, editing_threshold, min_unmask)
    else:
        *numbers, last = _numbers(rows, x.device, threshold, editing_threshold, min_unmask, draw)
    editable = None if editable is None else editable.contiguous()
    positions = None if positions is None else positions.contiguous()
    return Rules._make((tokens.contiguous(), mask_token_id, *numbers, editable, positions, last))


def _id(value: Any) -> int:
    """The mask token's id from what stands for an int, such as an integer of NumPy."""
    try:
        if isinstance(value, bool) or getattr(value, "ndim", 0) != 0:
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"mask_token_id: expected an int, got {type(value).__name__} {value!r:.80}") from None


def _numbers(
    rows: int,
    device: torch.device,
    threshold: PerRow,
    editing_threshold: PerRow | None,
    min_unmask: PerRow,
    draw: tuple[PerRow, PerRow | None, PerRow | None, PerRow | None, PerRow] | None = None,
) -> tuple[Tensor | None, ...]:
    """The fields of Rules that are a number per row, in their order. ``draw``: temperature, top_k, top_p, seed and forward_index."""

    def per_row(name: str, value: PerRow, dtype: torch.dtype, low: float, high: float) -> Tensor:
        return _per_row(name, value, dtype, low, high, rows, device)

    inf = math.inf
    editing = None
    if editing_threshold is not None:
        low = -inf if isinstance(editing_threshold, Tensor | Sequence) else 0.0
        editing = per_row("editing_threshold", editing_threshold, torch.float32, low, 1)
    greedy = per_row("threshold", threshold, torch.float32, 0, 1), editing, per_row("min_unmask", min_unmask, torch.int64, 0, inf)
    if draw is None:
        return (*greedy, None, None, None, None, None)
    temperature, top_k, top_p, seed, forward_index = draw
    if seed is None:
        seed = torch.randint(0, 2**63 - 1, (1,)).to(device).expand(rows)
    return (
        *greedy,
        per_row("temperature", temperature, torch.float64, 0, inf),
        None if top_k is None or _is_number(top_k, 0) else per_row("top_k", top_k, torch.int64, 0, inf),
        None if top_p is None or _is_number(top_p, 1) else per_row("top_p", top_p, torch.float64, 0, 1),
        per_row("seed", seed, torch.int64, 0, inf),
        per_row("forward_index", forward_index, torch.int64, -inf, inf),
    )


_PLAIN = frozenset((int, float, type(None)))


@functools.lru_cache(maxsize=64, typed=True)
def _kept_numbers(rows: int, threshold: float, editing_threshold: float | None, min_unmask: int) -> tuple[Tensor | None, ...]:
    """:func:`_numbers` on a CPU at temperature 0, the same tensors for all calls: a decoding loop asks thousands of times, and checking
    and filling took a tenth of a call."""
    with torch.inference_mode(False), _disable_current_modes():  # calls under other modes get them as well
        return _numbers(rows, torch.device("cpu"), threshold, editing_threshold, min_unmask)


def _is_number(value: PerRow, number: float) -> bool:
    return isinstance(value, (int, float)) and value == number


def _per_row(
    name: str,
    value: PerRow,
    dtype: torch.dtype,
    low: float,
    high: float,
    rows: int,
    device: torch.device,
) -> Tensor:
    """``value`` as a tensor [rows], its range checked where that costs no synchronisation."""
    integral = dtype == torch.int64
    if isinstance(value, bool | str) or not isinstance(value, int | float | Sequence | Tensor):
        raise TypeError(f"{name}: expected a number or one per row, got {type(value).__name__}")
    given: Sequence[float] = ()
    if isinstance(value, int | float):
        given = [value]
    elif isinstance(value, Tensor):
        value = value.expand(rows) if value.ndim == 0 else value
        if integral and (value.is_floating_point() or value.dtype == torch.bool):
            raise ValueError(f"{name}: expected an integer dtype, got {value.dtype}")
        check_shape(name, value, rows)
        if value.device.type == "cpu" and not torch.compiler.is_compiling():
            given = value.tolist()
    else:
        given = list(value)
        if len(given) != rows:
            raise ValueError(f"{name}: expected one number per row ({rows}), got {len(given)}")
    for v in given:
        if isinstance(v, bool) or not isinstance(v, int if integral else int | float):
            raise ValueError(f"{name}: expected {'integers' if integral else 'numbers'}, got {v!r}")
        if not low <= v <= high or v in (math.inf, -math.inf) or (integral and not -(2**63) <= v < 2**63):
            span = f"in [{low}, {high}]" if high < math.inf else f"at least {low} and {'below 2^63' if integral else 'finite'}"
            raise ValueError(f"{name}: expected numbers {span}, got {v}")
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype).contiguous()
    if isinstance(value, int | float):
        return torch.full((rows,), value, dtype=dtype, device=device)  # filled there: a copy to a GPU would wait for it
    return torch.tensor(given, dtype=dtype, device=device)
