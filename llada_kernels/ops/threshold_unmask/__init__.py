"""The sampler of block diffusion: choose a token per position, decide which positions take it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._common import check_same, check_shape, check_tensor
from ..dispatch import run
from . import native, reference

__all__ = ["Unmasked", "threshold_unmask"]

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


def threshold_unmask(
    logits: Tensor,
    tokens: Tensor,
    mask_token_id: int,
    threshold: PerRow,
    editing_threshold: PerRow | None = None,
    min_unmask: PerRow = 1,
    temperature: PerRow = 0.0,
    top_k: PerRow | None = None,
    top_p: PerRow | None = None,
    seed: PerRow | None = None,
    editable: Tensor | None = None,
    positions: Tensor | None = None,
    forward_index: PerRow = 0,
    *,
    backend: str | None = None,
) -> Unmasked:
    """One decoding step: unmask confident positions (M2T) and edit written ones (T2T).

    *Choice*, one token per position, never the mask token:

    - temperature 0: the largest logit, lowest id among equals. Its confidence is its softmax
      probability on the raw logits, the mask token in the denominator; top_k, top_p are ignored.
    - temperature > 0: the distribution is softmax(logits / temperature) cut by top_k (the k largest
      logits, lowest ids among equals), then by top_p (of what is left, renormalised, sorted by
      probability, lowest ids first among equals: the shortest prefix whose mass reaches top_p, at
      least one token). The mask token takes part in all of this. One token is drawn among the kept
      ones without the mask token, in proportion to their probabilities; its confidence is its
      probability in the kept distribution, which contains the mask token's mass if that was kept.
      If nothing but the mask token was kept (or the rest of what was kept rounds to 0 beside it), the
      largest other logit is chosen with confidence 0, which no threshold accepts.

    *M2T*: if at least ``min_unmask`` masked positions have confidence > threshold, exactly those
    take their token, else the ``min(min_unmask, number masked)`` most confident ones (lowest
    position first among equals). *T2T*: positions not masked before the call and editable whose
    chosen token differs take it where confidence > editing_threshold.

    Parameters marked "per row" are a number or one number per row (sequence or tensor [R]).

    Args:
        logits: [R, L, V] fp32 or bf16 (reference: any floating dtype).
        tokens: [R, L] int64: current tokens; masked is where they equal ``mask_token_id``.
        mask_token_id: id in [0, V).
        threshold: per row, in [0, 1].
        editing_threshold: None: no editing; 0.0 edits every changed token. Per row, in [0, 1]; in a
            sequence or tensor an entry below 0 turns the row's editing off.
        min_unmask: per row, at least 0.
        temperature: per row, at least 0.
        top_k: per row, at least 0; None or 0 is off.
        top_p: per row, in [0, 1]; None or 1 is off.
        seed: per row, int64, at least 0; None draws one from torch's generator when it is needed.
        editable: [R, L] bool: positions that editing may change; None: all.
        positions: [R, L] int64: absolute positions, which key the random numbers; None: 0..L-1.
        forward_index: per row, int64: which forward of the row this is.
        backend: use this backend or raise; by default the first that supports the call.

    Precision: at temperature 0 confidences within 1e-6 relative of the exact softmax (exponentials in
        fp32); at temperature > 0 exponentials and sums in fp64. Both are fixed to the bit (see
        reference.py). Comparisons in fp32.
    Determinism: the result is bitwise equal in all backends and on any number of threads. The
        random number of a position depends on (seed, position, forward_index) only, never on the
        batch.

    Returns:
        An Unmasked (tokens, confidence, counts).

    Raises:
        ValueError: a shape, dtype or device differs, a parameter is outside its range (entries of
            tensors are checked on a CPU), or, on a CPU, a position's logits hold NaN, +inf or
            nothing finite but the mask token's: the row and the position are named.
    """
    check_tensor("logits", logits, 3)
    if not logits.is_floating_point():
        raise ValueError(f"logits: expected a floating dtype, got {logits.dtype}")
    rows, length, vocab = logits.shape
    check_tensor("tokens", tokens, 2, (torch.int64,))
    check_shape("tokens", tokens, rows, length)
    check_same("tokens", tokens, "logits", logits, dtype=False)
    if not 0 <= mask_token_id < vocab:
        raise ValueError(f"mask_token_id: expected an id in [0, {vocab}), got {mask_token_id}")
    if vocab < 2:
        raise ValueError(f"logits: expected at least 2 ids in the last dimension, got {vocab}")
    for name, x, dtype in (("editable", editable, torch.bool), ("positions", positions, torch.int64)):
        if x is not None:
            check_tensor(name, x, 2, (dtype,))
            check_shape(name, x, rows, length)
            check_same(name, x, "logits", logits, dtype=False)

    def per_row(name: str, value: PerRow, dtype: torch.dtype, low: float, high: float) -> Tensor:
        return _per_row(name, value, dtype, low, high, rows, logits.device)

    inf = math.inf
    low = -inf if isinstance(editing_threshold, Tensor | Sequence) else 0.0
    editing = None
    if editing_threshold is not None:
        editing = per_row("editing_threshold", editing_threshold, torch.float32, low, 1)
    sampling = not _is_number(temperature, 0)
    if seed is None:
        seed = torch.randint(0, 2**63 - 1, (1,)).to(logits.device).expand(rows) if sampling else 0
    if not sampling or (top_k is not None and _is_number(top_k, 0)):
        top_k = None
    if not sampling or (top_p is not None and _is_number(top_p, 1)):
        top_p = None
    arguments = (
        logits,
        tokens,
        int(mask_token_id),
        per_row("threshold", threshold, torch.float32, 0, 1),
        editing,
        per_row("min_unmask", min_unmask, torch.int64, 0, inf),
        per_row("temperature", temperature, torch.float64, 0, inf) if sampling else None,
        None if top_k is None else per_row("top_k", top_k, torch.int64, 0, inf),
        None if top_p is None else per_row("top_p", top_p, torch.float64, 0, 1),
        per_row("seed", seed, torch.int64, 0, inf) if sampling else None,
        editable,
        positions,
        per_row("forward_index", forward_index, torch.int64, -inf, inf) if sampling else None,
    )
    return Unmasked(*run("threshold_unmask", BACKENDS, backend, *arguments))


def _is_number(value: PerRow, number: float) -> bool:
    return isinstance(value, int | float) and value == number


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
    given: list[float] | None = None
    if isinstance(value, int | float):
        given = [value]
        result = torch.full((rows,), value, dtype=dtype, device=device) if _whole(value, integral) \
            else torch.empty(0)  # fmt: skip
    elif isinstance(value, Tensor):
        if value.ndim == 0:
            value = value.expand(rows)
        if integral and (value.is_floating_point() or value.dtype == torch.bool):
            raise ValueError(f"{name}: expected an integer dtype, got {value.dtype}")
        check_shape(name, value, rows)
        result = value.to(device=device, dtype=dtype)
        if value.device.type == "cpu" and not torch.compiler.is_compiling():
            given = value.tolist()
    else:
        given = list(value)
        if len(given) != rows:
            raise ValueError(f"{name}: expected one number per row ({rows}), got {len(given)}")
        result = torch.tensor(given, dtype=dtype, device=device) if all(
            _whole(v, integral) for v in given
        ) else torch.empty(0)  # fmt: skip
    for v in given or ():
        if not _whole(v, integral):
            raise ValueError(f"{name}: expected integers, got {v}")
        if not low <= v <= high or v in (math.inf, -math.inf):
            span = f"in [{low}, {high}]" if high < math.inf else f"at least {low} and finite"
            raise ValueError(f"{name}: expected numbers {span}, got {v}")
    return result


def _whole(value: float, integral: bool) -> bool:
    return not integral or isinstance(value, int)


BACKENDS = (native.BACKEND, reference.BACKEND)
