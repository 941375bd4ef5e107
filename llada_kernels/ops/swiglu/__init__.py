"""The gated activation of the family's MLPs."""

from __future__ import annotations

from torch import Tensor

from .._common import check_tensor
from ..dispatch import run
from ..grouped_gemm import FLOATS
from . import native, reference, triton

__all__ = ["BACKENDS", "swiglu"]

BACKENDS = (native.BACKEND, triton.BACKEND, reference.BACKEND)


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
