"""Triton kernels: one pass over the rows, forward and backward. Bound by memory traffic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._triton import define, define_autograd, triton_reason
from ..dispatch import Backend

#: Elements of a program: 16 per thread of 4 warps, so that each thread has two or more loads of 16 bytes in flight per input.
TILE = 2048


def _swiglu(gate_up: Tensor) -> Tensor:
    rows = gate_up.reshape(gate_up.shape[:-1].numel(), gate_up.shape[-1])
    return torch.ops.llada_kernels_triton.swiglu(rows).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _blocks(width: int) -> dict[str, int]:
    """Columns and rows of a program's tile: whole rows while they fit."""
    columns = min(1 << max(width - 1, 0).bit_length(), TILE)
    return {"COLUMNS": columns, "ROWS": TILE // columns, "num_warps": 4}


def _grid(rows: int, width: int, blocks: dict[str, int]) -> tuple[int, int]:
    return -(-rows // blocks["ROWS"]), -(-width // blocks["COLUMNS"])


def _forward(gate_up: Tensor) -> Tensor:
    from . import triton_kernels

    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, width)
    if y.numel():
        blocks = _blocks(width)
        triton_kernels.swiglu_kernel[_grid(rows, width, blocks)](gate_up, y, rows, WIDTH=width, **blocks)
    return y


def _forward_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _backward(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    from . import triton_kernels

    grad_y, gate_up = grad_y.contiguous(), gate_up.contiguous()
    rows, width = grad_y.shape
    grad = torch.empty_like(gate_up)
    if grad.numel():
        blocks = _blocks(width)
        triton_kernels.swiglu_backward_kernel[_grid(rows, width, blocks)](grad_y, gate_up, grad, rows, WIDTH=width, **blocks)
    return grad


def _backward_fake(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad_y: Tensor) -> Tensor:
    return torch.ops.llada_kernels_triton.swiglu_backward(grad_y, *ctx.saved_tensors)


define("swiglu(Tensor gate_up) -> Tensor", _forward, _forward_fake)
define("swiglu_backward(Tensor grad_y, Tensor gate_up) -> Tensor", _backward, _backward_fake)
define_autograd("swiglu", _autograd, _setup_context)

BACKEND: Backend = Backend("triton", triton_reason, _swiglu)
