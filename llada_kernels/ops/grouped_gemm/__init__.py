"""Matrix products of consecutive groups of rows, each with its own weight."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import check_same, check_shape, check_tensor
from ..dispatch import run
from . import native, reference, triton

__all__ = ["BACKENDS", "check_offsets", "grouped_gemm"]

BACKENDS = (native.BACKEND, triton.BACKEND, reference.BACKEND)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_offsets(name: str, offsets: Tensor, rows: int) -> None:
    """Raise unless ``offsets`` rises from 0 to ``rows``.

    Values are read only from CPU tensors outside torch.compile: anywhere else that would be a sync
    or a graph break.
    """
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != rows:
        raise ValueError(f"{name}: expected to start at 0 and end at {rows} (the number of rows), got {values[0]} and {values[-1]}")
    for i in range(1, len(values)):
        if values[i] < values[i - 1]:
            raise ValueError(f"{name}: expected rising values, got {values[i - 1]} before {values[i]} at index {i}")


def grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor, *, backend: str | None = None) -> Tensor:
    """``a[offsets[e]:offsets[e+1]] @ b[e].T`` for every group e, empty ones included, unpadded.

    Args:
        a: floating point [M, Kd]. Rows, those of group 0 first.
        b: same dtype [E, N, Kd]. One weight per group. Groups without rows are not read; their
            gradient is zero.
        offsets: int32 [E + 1], rising from 0 to M.
        backend: None chooses by the arguments; a name never falls back.

    Returns:
        Same dtype [M, N], differentiable with respect to ``a`` and ``b``.

    Precision: products accumulated in at least fp32, rounded once. Determinism: bitwise,
    independent of the number of threads.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a wrong shape, dtype or device, or offsets that do not rise from 0 to M.
    """
    check_tensor("a", a, 2, FLOATS)
    check_tensor("b", b, 3)
    check_tensor("offsets", offsets, 1, (torch.int32,))
    check_same("b", b, "a", a)
    check_same("offsets", offsets, "a", a, dtype=False)
    if b.shape[0] < 1:
        raise ValueError(f"b: expected at least one group, got shape {tuple(b.shape)}")
    check_shape("b", b, None, None, a.shape[1])
    check_shape("offsets", offsets, b.shape[0] + 1)
    check_offsets("offsets", offsets, a.shape[0])
    return run("grouped_gemm", BACKENDS, backend, a, b, offsets)
