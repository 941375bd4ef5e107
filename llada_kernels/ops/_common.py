"""What several ops share: the dtype of internal arithmetic and the argument checks with their wording."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _library

NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def compute_dtype(x: Tensor) -> torch.dtype:
    """max(fp32, dtype of x): what references compute in, so that everything can be checked in fp64."""
    return torch.promote_types(torch.float32, x.dtype)


def check_tensor(name: str, x: object, ndim: int | None = None, dtypes: tuple[torch.dtype, ...] | None = None) -> Tensor:
    """Return ``x`` if it is a tensor of ``ndim`` dimensions and one of ``dtypes``, else raise naming the argument."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if ndim is not None and x.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(x.shape)}")
    if dtypes is not None and x.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name}: expected dtype {expected}, got {str(x.dtype).removeprefix('torch.')}")
    return x


def check_shape(name: str, x: Tensor, *expected: int | None) -> None:
    """Raise unless ``x`` has the expected shape; None stands for any size."""
    if x.shape == expected:
        return
    if x.ndim != len(expected) or any(e is not None and e != s for e, s in zip(expected, x.shape, strict=False)):
        shown = str(tuple("*" if e is None else e for e in expected)).replace("'", "")
        raise ValueError(f"{name}: expected shape {shown}, got {tuple(x.shape)}")


def check_same(name: str, x: Tensor, other_name: str, other: Tensor, dtype: bool = True) -> None:
    """Raise unless ``x`` is on the device of ``other`` and, with ``dtype``, of its dtype."""
    if x.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} (that of {other_name}), got {x.device}")
    if dtype and x.dtype != other.dtype:
        raise ValueError(f"{name}: expected dtype {other.dtype} (that of {other_name}), got {x.dtype}")


def check_eps(eps: object) -> float:
    """``eps`` as a float; raise unless it is a finite number of at least 0."""
    if type(eps) is float and 0.0 <= eps < math.inf:
        return eps
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__} {eps!r:.80}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite number of at least 0, got {eps}")
    return float(eps)


def native_reason(
    first: Tensor, *others: Tensor | None, dtypes: tuple[torch.dtype, ...] = NATIVE_DTYPES, cuda: str | None = None
) -> str | None:
    """Why the native backend cannot serve these tensors, or None. The first one decides about the dtype.

    ``cuda`` names the operator whose CUDA kernels serve CUDA tensors; None: there are none.
    """
    if _library.load_error is not None:
        return f"the compiled library is not loaded: {_library.load_error}"
    for x in (first, *others):
        if x is None or x.is_cpu:
            continue
        if not x.is_cuda:
            return f"native serves CPU tensors, got {x.device}"
        if cuda is None:
            return "native has no CUDA kernels for this op"
        if cuda not in _library.cuda_operators:
            return "CUDA kernels not built"
        if torch.cuda.get_device_properties(x.device).major < 8:
            return f"native serves GPUs of compute capability 8.0 and newer, got {torch.cuda.get_device_name(x.device)}"
    if first.dtype not in dtypes:
        return f"native serves {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {first.dtype}"
    return None


def register_autograd(
    operator: str, backward: Callable[..., Any], setup_context: Callable[..., None], lib: torch.library.Library | None = None
) -> None:
    """``torch.library.register_autograd`` for an operator whose ``backward`` calls ``<operator>_backward``.

    That one's own derivative raises: without it PyTorch takes second derivatives for 0, with a warning only.
    """

    def refuse(*_: Any) -> NoReturn:
        name = operator.partition("::")[2]
        raise RuntimeError(f"{name}: expected to be differentiated once with this backend, got a second time: backend='reference' can be")

    torch.library.register_autograd(operator, backward, setup_context=setup_context, lib=lib)
    torch.library.register_autograd(f"{operator}_backward", refuse, lib=lib)
