"""grouped_gemm in plain PyTorch: a loop over the experts that have rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend


def _loop(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    # unbind and split rather than indexing: their backward is one stack and one cat, not a
    # full-sized zero tensor per expert.
    counts = offsets.diff().tolist()
    pairs = list(zip(a.split(counts), b.unbind(0), strict=True))
    return torch.cat([rows @ weight.mT for rows, weight in pairs if rows.shape[0]] or [pairs[0][0] @ pairs[0][1].mT])


# The loop's trip counts are data, which torch.compile cannot trace: there it is one opaque operator
# with a written backward.
@torch.library.custom_op("llada_kernels_reference::grouped_gemm", mutates_args=())
def _loop_op(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return _loop(a, b, offsets)


@torch.library.custom_op("llada_kernels_reference::grouped_gemm_backward", mutates_args=())
def _loop_backward_op(grad: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    grad_a, grad_b = torch.empty_like(a), torch.zeros_like(b)
    bounds = offsets.tolist()
    for expert, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end > begin:
            grad_a[begin:end] = grad[begin:end] @ b[expert]
            grad_b[expert] = grad[begin:end].mT @ a[begin:end]
    return grad_a, grad_b


@_loop_op.register_fake
def _(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@_loop_backward_op.register_fake
def _(grad: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(b)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_loop_backward_op(grad, *ctx.saved_tensors), None


_loop_op.register_autograd(_backward, setup_context=_setup_context)


def grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """See :func:`llada_kernels.ops.grouped_gemm`."""
    return (_loop_op if torch.compiler.is_compiling() else _loop)(a, b, offsets)


BACKEND = Backend("reference", lambda *args: None, grouped_gemm)
