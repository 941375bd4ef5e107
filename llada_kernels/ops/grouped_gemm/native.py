"""grouped_gemm in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _library
from .._common import native_reason, register_autograd
from ..dispatch import Backend


def grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """See :func:`llada_kernels.ops.grouped_gemm`."""
    return torch.ops.llada_kernels.grouped_gemm(a.contiguous(), b.contiguous(), offsets.contiguous())


if _library.load_error is None:

    @torch.library.register_fake("llada_kernels::grouped_gemm")
    def _fake(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
        return a.new_empty(a.shape[0], b.shape[1])

    @torch.library.register_fake("llada_kernels::grouped_gemm_backward")
    def _fake_backward(grad: Tensor, a: Tensor, b: Tensor, offsets: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor]:
        return torch.empty_like(a) if need_a else a.new_empty(0), torch.empty_like(b) if need_b else b.new_empty(0)

    def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_a, need_b, _ = ctx.needs_input_grad
        grads = torch.ops.llada_kernels.grouped_gemm_backward(grad.contiguous(), *ctx.saved_tensors, need_a, need_b)
        return grads[0] if need_a else None, grads[1] if need_b else None, None

    register_autograd("llada_kernels::grouped_gemm", _backward, _setup_context)


BACKEND = Backend("native", native_reason, grouped_gemm)
