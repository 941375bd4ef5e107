"""Triton kernels: a pass over the rows forward, one backward, and a sum of the weight's gradient in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _triton
from .._triton import define, define_autograd, triton_reason
from ..dispatch import Backend

#: Widest row that a program holds in its registers: 32 numbers per thread.
WIDEST = 8192


def _supports(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> str | None:
    if x.shape[-1] > WIDEST:
        return f"triton serves rows of up to {WIDEST} elements, got {x.shape[-1]}"
    return triton_reason(x, weight, residual)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    flat = (x.numel() // max(x.shape[-1], 1), x.shape[-1])
    more = None if residual is None else residual.reshape(flat)
    y, total, _ = torch.ops.llada_kernels_triton.rms_norm(x.reshape(flat), weight, eps, more)
    return y.view(x.shape) if residual is None else (y.view(x.shape), total.view(x.shape))


def _blocks(width: int) -> dict[str, int]:
    """Whole rows, 16 elements and more per thread: several loads of 16 bytes are in flight."""
    columns = max(16, 1 << (width - 1).bit_length())
    return {"COLUMNS": columns, "ROWS": max(1, 2048 // columns), "num_warps": min(8, max(4, columns // 1024))}


def programs(rows: int, rows_per_tile: int, device: torch.device) -> int:
    """Programs of a backward, each with a partial sum of the weight's gradient: enough to fill the device."""
    return min(-(-rows // rows_per_tile), 4 * _triton.num_sms(device))


def sum_parts(partial: Tensor) -> Tensor:
    """[parts, width] fp32 -> [width] fp32."""
    from .triton_kernels import sum_parts_kernel

    parts, width = partial.shape
    out = partial.new_empty(width)
    sum_parts_kernel[(-(-width // 64),)](partial, out, parts, WIDTH=width, PARTS=32, COLUMNS=64, num_warps=4)
    return out


def _forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_kernels import rms_norm_kernel

    x, weight = x.contiguous(), weight.contiguous()
    rows, width = x.shape
    y, total, rstd = _forward_fake(x, weight, eps, residual)
    if x.numel():
        blocks = _blocks(width)
        more = x if residual is None else residual.contiguous()
        rms_norm_kernel[(-(-rows // blocks["ROWS"]),)](
            x, more, weight, y, total, rstd, rows, eps, WITH_RESIDUAL=residual is not None, WIDTH=width, **blocks
        )
    return y, total, rstd


def _forward_fake(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[0], dtype=torch.float32)


def _backward(grad_y: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    from .triton_kernels import rms_norm_backward_kernel

    grad_y, x, weight = grad_y.contiguous(), x.contiguous(), weight.contiguous()
    rows, width = x.shape
    grad_x = torch.empty_like(x)
    if not x.numel():
        return grad_x, torch.zeros_like(weight, dtype=torch.float32)
    blocks = _blocks(width)
    count = programs(rows, blocks["ROWS"], x.device)
    partial = x.new_empty(count, width, dtype=torch.float32)
    more = grad_y if grad_total is None else grad_total.contiguous()
    rms_norm_backward_kernel[(count,)](
        grad_y, more, x, weight, rstd, grad_x, partial, rows, WITH_TOTAL=grad_total is not None, WIDTH=width, **blocks
    )
    return grad_x, sum_parts(partial)


def _backward_fake(grad_y: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, residual = inputs
    ctx.with_residual = residual is not None
    ctx.save_for_backward(x if residual is None else output[1], weight, output[2])
    ctx.mark_non_differentiable(output[2], *([] if ctx.with_residual else [output[1]]))


def _autograd(ctx: Any, grad_y: Tensor, grad_total: Tensor, _grad_rstd: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    more = grad_total if ctx.with_residual else None
    grad_x, grad_weight = torch.ops.llada_kernels_triton.rms_norm_backward(grad_y, more, x, weight, rstd)
    return grad_x, grad_weight.to(weight.dtype), None, grad_x if ctx.with_residual else None


define("rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor y, Tensor total, Tensor rstd)", _forward, _forward_fake)
define(
    "rms_norm_backward(Tensor grad_y, Tensor? grad_total, Tensor x, Tensor weight, Tensor rstd) -> (Tensor grad_x, Tensor grad_weight)",
    _backward, _backward_fake,
)  # fmt: skip
define_autograd("rms_norm", _autograd, _setup_context)

BACKEND: Backend = Backend("triton", _supports, _rms_norm)
