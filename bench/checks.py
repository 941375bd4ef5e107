"""Telling right values from wrong ones: the error rule of the tests, and exact comparison. A check returns None or what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llada_kernels.testing import max_error

__all__ = ["as_exact_as", "as_list", "close", "equal"]

Pick = Callable[[Any], Sequence[Tensor]]
Check = Callable[[Any], str | None]


def as_list(result: Any) -> Sequence[Tensor]:
    """The tensors that a variant returned."""
    return [result] if isinstance(result, Tensor) else list(result)


def as_exact_as(exact: Sequence[Tensor], same_dtype: Sequence[Tensor], pick: Pick = as_list, factor: float = 2.0) -> Check:
    """A check that the error of each tensor is at most ``factor`` times that of PyTorch in the same dtype (plus 1e-5 of the largest value).

    Args:
        exact: the values in fp32 or fp64.
        same_dtype: what plain PyTorch computes in the dtype of the case.
        pick: takes the compared tensors out of what a variant returned.
    """
    scale = [max(1e-30, float(e.double().abs().max())) if e.numel() else 1.0 for e in exact]
    allowed = [factor * max_error(s, e) + 1e-5 * c for s, e, c in zip(same_dtype, exact, scale, strict=True)]
    if not all(math.isfinite(a) for a in allowed):
        raise ValueError("same_dtype: expected finite values close to the exact ones, got NaN or infinity")

    def check(result: Any) -> str | None:
        picked = list(pick(result))
        if len(picked) != len(exact):
            return f"{len(picked)} tensors, expected {len(exact)}"
        for i, (x, e, a) in enumerate(zip(picked, exact, allowed, strict=True)):
            if x.shape != e.shape:
                return f"output {i}: shape {tuple(x.shape)}, expected {tuple(e.shape)}"
            if (error := max_error(x, e)) > a:
                return f"output {i}: error {error:.3e}, allowed {a:.3e}"
        return None

    return check


def close(exact: Sequence[Tensor], tolerance: float, pick: Pick = as_list) -> Check:
    """A check that each tensor differs by at most ``tolerance`` times the largest value of its ``exact``."""

    def check(result: Any) -> str | None:
        for i, (x, e) in enumerate(zip(pick(result), exact, strict=True)):
            if x.shape != e.shape:
                return f"output {i}: shape {tuple(x.shape)}, expected {tuple(e.shape)}"
            scale = max(1e-30, float(e.double().abs().max())) if e.numel() else 1.0
            if (error := max_error(x, e)) > tolerance * scale:
                return f"output {i}: error {error:.3e}, allowed {tolerance * scale:.3e}"
        return None

    return check


def equal(expected: Sequence[Tensor], pick: Pick = as_list) -> Check:
    """A check that every tensor is exactly the expected one: for integers, and where backends agree bitwise."""

    def check(result: Any) -> str | None:
        for i, (x, e) in enumerate(zip(pick(result), expected, strict=True)):
            if x.shape != e.shape or not torch.equal(x, e):
                different = int((x != e).sum()) if x.shape == e.shape else "all"
                return f"output {i}: {different} of {e.numel()} values differ"
        return None

    return check
