"""What tests and benches share: the error rule, and random document lengths."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_as_exact_as", "max_error", "random_document_lengths"]


def max_error(x: Tensor, reference: Tensor) -> float:
    """Largest absolute difference, in fp64; inf where only one side is finite."""
    if x.shape != reference.shape:
        raise AssertionError(f"shape {tuple(x.shape)}, expected {tuple(reference.shape)}")
    if x.numel() == 0:
        return 0.0
    difference = (x.double() - reference.double()).abs()
    return float(torch.where(torch.isnan(difference), torch.inf, difference).max())


def assert_as_exact_as(x: Tensor, same_dtype: Tensor, exact: Tensor, factor: float = 2.0, floor: float = 1e-5, name: str = "") -> None:
    """Assert that the error of ``x`` is at most ``factor`` times that of ``same_dtype`` (both against ``exact``), plus a floor.

    Args:
        x: what is tested.
        same_dtype: what plain PyTorch computes in the same dtype.
        exact: the same in fp32 or fp64.
        floor: relative to the largest magnitude of ``exact`` (at least 1).
    """
    scale = max(1.0, float(exact.double().abs().max()) if exact.numel() else 1.0)
    error, allowed = max_error(x, exact), factor * max_error(same_dtype, exact) + floor * scale
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e} (same-dtype PyTorch: {max_error(same_dtype, exact):.3e})"


def random_document_lengths(total: int, mean: int, seed: int, multiple: int = 1) -> list[int]:
    """Log-normal document lengths (sigma 1) that sum to ``total``, each a multiple of ``multiple`` but for the last."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        draw = float(torch.empty(1).log_normal_(0.0, 1.0, generator=generator)) * mean / 1.6487
        lengths.append(min(left, max(multiple, round(draw / multiple) * multiple)))
    return lengths
