"""C++ kernels: one pass over the rows, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _library
from .._common import native_reason, register_autograd
from ..dispatch import Backend


def _swiglu(gate_up: Tensor) -> Tensor:
    width = gate_up.shape[-1]
    rows = gate_up.contiguous().view(gate_up.shape[:-1].numel(), width)
    return torch.ops.llada_kernels.swiglu(rows).view(*gate_up.shape[:-1], width // 2)


if _library.load_error is None:

    @torch.library.register_fake("llada_kernels::swiglu")
    def _fake(gate_up: Tensor) -> Tensor:
        return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)

    @torch.library.register_fake("llada_kernels::swiglu_backward")
    def _fake_backward(grad_y: Tensor, gate_up: Tensor) -> Tensor:
        return torch.empty_like(gate_up)

    def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def _backward(ctx: Any, grad_y: Tensor) -> Tensor:
        return torch.ops.llada_kernels.swiglu_backward(grad_y.contiguous(), *ctx.saved_tensors)

    register_autograd("llada_kernels::swiglu", _backward, _setup_context)


BACKEND: Backend = Backend("native", native_reason, _swiglu)
