"""What the Triton backends share: when they cannot serve, how their operators are registered, facts about the device.

Nothing here imports triton: a backend's ``triton.py`` imports its ``triton_kernels.py`` at the first launch.

Launches never recompile when lengths change. Integers that differ from call to call (tokens, rows, counts, a grid's extent) are named in
``do_not_specialize`` of their kernel, and index tensors that may be slices in ``do_not_specialize_on_alignment``; what is fixed by the
model (head dim, number of heads, widths) is a ``tl.constexpr``. Kernels with other block sizes are chosen by such constants and the
device alone, in one function per op.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ._common import register_autograd

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Triton's interpreter runs kernels on CPU tensors, slowly: for tests. Triton itself reads the variable when a kernel is defined.
interpreting = os.environ.get("TRITON_INTERPRET") == "1"
device_type = "cpu" if interpreting else "cuda"


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:  # a nightly build under another name
        return None
    major, minor = (int(part) for part in version.split(".")[:2])
    return None if (major, minor) >= (3, 6) else f"triton 3.6 or newer is needed, got {version}"


#: None, or why there is no usable triton.
missing = _missing()


def triton_reason(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """Why a Triton backend cannot serve these tensors, or None. The first one decides about the dtype."""
    if missing is not None:
        return missing
    present = [t for t in tensors if t is not None]
    for i, x in enumerate(present):
        if x.device.type != device_type:
            return f"triton serves {device_type.upper()} tensors, got {x.device}"
        if i == 0 and x.dtype not in dtypes:
            return f"triton serves {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {x.dtype}"
        if interpreting and x.dtype == torch.bfloat16:
            return "triton's interpreter computes bfloat16 wrongly"
    if present and (arch := capability(present[0].device)) < 80:
        return f"triton serves GPUs of compute capability 8.0 and newer, got {arch // 10}.{arch % 10}"
    return None


def capability(device: torch.device) -> int:
    """Compute capability as 10 * major + minor: 90 on Hopper. 80 for the interpreter."""
    if device.type != "cuda":
        return 80
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor


def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device. 4 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


_LIBRARY = torch.library.Library("llada_kernels_triton", "DEF")


def define(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register ``torch.ops.llada_kernels_triton.<name>``: opaque to torch.compile, which then needs no knowledge of Triton.

    Args:
        schema: ``"name(Tensor x, ...) -> Tensor"``; the first argument is a tensor, and decides the device.
        launch: allocates the results and launches the kernels. Any strides may come in.
        fake: the results' shapes, dtypes and strides, without data.
    """
    name = schema.partition("(")[0]

    def guarded(first: Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(first):  # Triton launches on the current device, whatever the tensors'
            return launch(first, *args)

    _LIBRARY.define(schema)
    for key in ("CUDA", "CPU"):
        _LIBRARY.impl(name, guarded, key)
    torch.library.register_fake(f"llada_kernels_triton::{name}", fake, lib=_LIBRARY)


def define_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give the operator ``name`` a backward, as :func:`register_autograd`."""
    register_autograd(f"llada_kernels_triton::{name}", backward, setup_context, _LIBRARY)
