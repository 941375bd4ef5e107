"""The gated activation of the family's MLPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from .. import _library
from ._common import check_tensor, native_reason
from .dispatch import Backend, run
from .grouped_gemm import FLOATS

__all__ = ["BACKENDS", "swiglu"]


def swiglu(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up, where the first half of the last dimension is gate and the second is up.

    Args:
        gate_up: floating point [..., 2I].
        backend: None chooses by the arguments; a name never falls back.

    Returns:
        Same dtype [..., I], differentiable.

    Precision: silu in at least fp32; it and the product are each rounded to the dtype, as in the
    official code.
    Determinism: bitwise, independent of the number of threads.

    Raises:
        TypeError: gate_up is not a tensor.
        ValueError: a wrong dtype, or a last dimension that is not even.
    """
    check_tensor("gate_up", gate_up, None, FLOATS)
    if gate_up.ndim < 1 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected an even last dimension, got shape {tuple(gate_up.shape)}")
    return run("swiglu", BACKENDS, backend, gate_up)


def _reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


def _native(gate_up: Tensor) -> Tensor:
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

    torch.library.register_autograd("llada_kernels::swiglu", _backward, setup_context=_setup_context)


BACKENDS = (Backend("native", native_reason, _native), Backend("reference", lambda *args: None, _reference))
