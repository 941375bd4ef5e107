"""Weights of experts in 8 or 4 bits, with a scale for every group of columns (fp8: for every block of 128 x 128)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._common import check_shape, check_tensor

__all__ = ["FP8_BLOCK", "GROUP_SIZES", "KINDS", "STORAGE", "QuantizedExperts", "check_group_size", "fp8_values"]

KINDS = ("int8", "int4", "fp8")
GROUP_SIZES = (32, 64, 128)
#: Columns that share a scale unless another size is asked for: 8.5 and 4.5 bits per weight. With int8 it keeps moe_mlp within 1.15 % of
#: the unquantised bf16 weights (64: 1.25 %), with int4 within 15 % (64: 16 %), on normal weights.
DEFAULT_GROUP_SIZE = 32
#: dtypes of ``data`` and of ``scales``
STORAGE = {
    "int8": (torch.int8, torch.bfloat16),
    "int4": (torch.uint8, torch.bfloat16),
    "fp8": (torch.float8_e4m3fn, torch.float32),
}
FP8_BLOCK = 128
_FP8_LARGEST = 448.0
_FP8_LEAST_SCALE = 2.0**-100  # also where everything is zero: nothing is divided by zero
_HALF = 16  # int4: byte j of 16 holds column j in its low and column 16 + j in its high half
#: Shares of the scale at which nothing is cut off: with 16 levels it is better to cut the tails a little.
_INT4_SHARES = (1.0, 0.9)
_CHUNK = 1 << 17  # weights quantised at a time on a CPU: their intermediate values stay in a cache


class QuantizedExperts(NamedTuple):
    """Expert weights [E, N, K] that :func:`moe_mlp` takes in place of a tensor, for inference.

    Attributes:
        kind: "int8", "int4" or "fp8".
        data: int8 [E, N, K]; or for int4 uint8 [E, N, K / 2]: 16 bytes hold 32 columns, byte j column j in its low and column 16 + j in
            its high four bits, each plus 8; or float8_e4m3fn [E, N, K], N and K multiples of 128.
        scales: bf16 [E, N, K / group_size]. A weight is its integer times the scale of its group. An int4 scale may be negative.
            For fp8: fp32 [E, N / 128, K / 128], each for a block of 128 x 128 weights.
    """

    kind: str
    data: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K) of the weights that this stands for."""
        experts, rows, columns = self.data.shape
        return experts, rows, columns * 2 if self.kind == "int4" else columns

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.shape[2] // self.scales.shape[2]

    def expert(self, e: int) -> QuantizedExperts:
        """One of the experts, [1, N, K]; shares memory."""
        return QuantizedExperts(self.kind, self.data[e : e + 1], self.scales[e : e + 1])

    @staticmethod
    def quantize(weight: Tensor, kind: str, group_size: int | None = None) -> QuantizedExperts:
        """Quantise.

        Args:
            weight: floating point [E, N, K].
            kind: "int8", "int4" or "fp8".
            group_size: 32, 64 or 128, a divisor of K; None takes 32. For fp8 128 or None.

        Precision: int8: the largest weight of a group becomes 127. int4: the one of largest magnitude becomes -8 or less, whichever of
            two scales leaves the least squared error after a least-squares fit. fp8: the largest of a block becomes 448. On normal
            weights the relative error of a weight is 0.54 % (int8) and 8.2 % (int4) in groups of 32, and 2.6 % (fp8). Determinism:
            bitwise.

        Raises:
            TypeError: ``weight`` is not a tensor.
            ValueError: an unknown kind, a group size that does not divide K, a weight of the wrong shape or that is not finite.
        """
        check_tensor("weight", weight, 3, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
        empty = QuantizedExperts.empty(tuple(weight.shape), kind, group_size, weight.device)
        for e, expert in enumerate(weight.detach().unbind(0)):
            empty._fill(e, slice(None), expert)
        finite = empty.scales.isfinite().flatten(1).all(1)
        if not bool(finite.all()):  # looked at once: on a GPU each look waits for all that was queued
            raise _not_finite(finite.tolist().index(False))
        return empty

    @staticmethod
    def empty(
        shape: tuple[int, ...], kind: str, group_size: int | None = None, device: torch.device | str | None = None
    ) -> QuantizedExperts:
        """Uninitialised experts of ``shape`` [E, N, K], to be filled by :meth:`set_rows`. Raises as :meth:`quantize`."""
        group_size = check_group_size(kind, group_size, shape[2])
        height = _height(kind)
        if shape[1] % height:
            raise ValueError(f"weight: expected a multiple of {height} rows for {kind}, got shape {tuple(shape)}")
        data_dtype, scale_dtype = STORAGE[kind]
        data = torch.empty(*shape[:2], shape[2] // (2 if kind == "int4" else 1), dtype=data_dtype, device=device)
        return QuantizedExperts(
            kind, data, torch.empty(shape[0], shape[1] // height, shape[2] // group_size, dtype=scale_dtype, device=device)
        )

    def set_rows(self, expert: int, rows: slice, weight: Tensor) -> None:
        """Quantise ``weight`` [n, K] into some rows of one expert (fp8: whole blocks of 128). Raises ValueError if it is not finite."""
        if not bool(self._fill(expert, rows, weight).isfinite().all()):
            raise _not_finite(expert)

    @torch.no_grad()
    def _fill(self, expert: int, rows: slice, weight: Tensor) -> Tensor:
        """Quantise into some rows of one expert without looking at a value; their scales, which are finite if the weights are."""
        begin, end, step = rows.indices(self.data.shape[1])
        if step != 1:
            raise ValueError(f"rows: expected a slice without a step, got {rows}")
        check_shape("weight", weight, self.data[expert, rows].shape[0], self.shape[2])
        height = _height(self.kind)
        if begin % height or end % height:
            raise ValueError(f"rows: expected multiples of {height} for {self.kind}, got {begin} to {end}")
        all_data, all_scales = self.data[expert, begin:end], self.scales[expert, begin // height : end // height]
        count = max(1, _CHUNK // (self.shape[2] * height)) * height if weight.device.type == "cpu" else max(height, end - begin)
        for data, scales, part in zip(all_data.split(count), all_scales.split(count // height), weight.split(count), strict=True):
            groups = part.to(torch.float32).unflatten(-1, (-1, self.group_size))
            if self.kind == "fp8":
                values, scale = _fp8(groups.unflatten(0, (-1, height)), (1, 3))
                scales.copy_(scale[:, 0, :, 0])
                data.copy_(values.flatten(2).flatten(0, 1))
                continue
            integers, scale = (_int8 if self.kind == "int8" else _int4)(groups)
            scales.copy_(scale.squeeze(-1))
            data.copy_(integers.flatten(-2) if self.kind == "int8" else _pack(integers.flatten(-2)))
        return all_scales

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``dtype`` [E, N, K]: each integer times its scale (exact in fp32), or e4m3 value times its scale in fp32, rounded once more."""
        if self.kind == "fp8":
            values = self.data.to(torch.float32).unflatten(-1, (-1, FP8_BLOCK)).unflatten(1, (-1, FP8_BLOCK))
            return (values * self.scales[:, :, None, :, None]).flatten(3).flatten(1, 2).to(dtype)
        integers = self.data if self.kind == "int8" else _unpack(self.data)
        groups = integers.to(torch.float32).unflatten(-1, (-1, self.group_size))
        return (groups * self.scales.to(torch.float32).unsqueeze(-1)).flatten(-2).to(dtype)


def _height(kind: str) -> int:
    """Rows that share a scale."""
    return FP8_BLOCK if kind == "fp8" else 1


def _not_finite(expert: int) -> ValueError:
    return ValueError(f"weight: expected finite values, got inf or NaN in expert {expert}")


def check_group_size(kind: str, group_size: int | None, columns: int) -> int:
    """The group size, or the default one for None; raises ValueError if weights of ``columns`` columns cannot have it."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    size = (FP8_BLOCK if kind == "fp8" else DEFAULT_GROUP_SIZE) if group_size is None else group_size
    if kind == "fp8" and size != FP8_BLOCK:
        raise ValueError(f"group_size: expected {FP8_BLOCK} for fp8, got {group_size!r}")
    if size not in GROUP_SIZES:
        raise ValueError(f"group_size: expected one of {', '.join(map(str, GROUP_SIZES))}, got {group_size!r}")
    if group_size is None and (columns % size or not columns):
        raise ValueError(f"kind: expected a weight whose columns are a multiple of {size} for {kind}, got {columns} columns")
    if columns % size or not columns:
        raise ValueError(f"group_size: expected a divisor of the {columns} columns of the weight, got {size}")
    return size


def _steps(scale: Tensor) -> tuple[Tensor, Tensor]:
    """``scale`` as it is stored, and its inverse; 0 has the inverse 0."""
    stored = scale.to(torch.bfloat16).to(torch.float32)
    return stored, torch.where(stored == 0, 0.0, 1 / stored)


def _int8(groups: Tensor) -> tuple[Tensor, Tensor]:
    scale, inverse = _steps(groups.abs().amax(-1, keepdim=True) / 127)
    return (groups * inverse).round_().clamp_(-127, 127), scale


def _int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    low, high = groups.aminmax(dim=-1, keepdim=True)
    full = torch.where(high > -low, high, low) / -8  # the levels are -8 .. 7: the wider side gets the eighth
    best_error: Tensor | None = None
    for share in _INT4_SHARES:
        _, inverse = _steps(full * share)
        integers = (groups * inverse).round_().clamp_(-8, 7)
        fitted = (groups * integers).sum(-1, keepdim=True) / integers.square().sum(-1, keepdim=True).clamp_(min=1)
        stored, inverse = _steps(torch.where(full.isfinite(), fitted, full))
        integers = (groups * inverse).round_().clamp_(-8, 7)
        error = (integers * stored).sub_(groups).square_().sum(-1, keepdim=True)
        if best_error is None:
            best, best_scale, best_error = integers, stored, error
            continue
        better = error < best_error
        best, best_scale = torch.where(better, integers, best), torch.where(better, stored, best_scale)
        best_error = torch.where(better, error, best_error)
    return best, best_scale


def _fp8(values: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """e4m3 values, and the scale of all along ``dims``, by which the largest becomes 448."""
    scale = (values.abs().amax(dims, keepdim=True) / _FP8_LARGEST).clamp_(min=_FP8_LEAST_SCALE)
    return (values / scale).to(torch.float8_e4m3fn), scale


def fp8_values(x: Tensor) -> Tensor:
    """fp32 [R, K] of what products with fp8 weights take of ``x``: each 128 columns of a row are e4m3 values times a scale of their own."""
    values, scale = _fp8(x.to(torch.float32).unflatten(-1, (-1, FP8_BLOCK)), (-1,))
    return (values.to(torch.float32) * scale).flatten(-2)


def _pack(integers: Tensor) -> Tensor:
    low, high = (integers + 8).to(torch.uint8).unflatten(-1, (-1, 2, _HALF)).unbind(-2)
    return (low | high << 4).flatten(-2)


def _unpack(data: Tensor) -> Tensor:
    low_high = data.unflatten(-1, (-1, 1, _HALF))
    return torch.cat([low_high & 15, low_high >> 4], -2).flatten(-3).to(torch.int8) - 8
