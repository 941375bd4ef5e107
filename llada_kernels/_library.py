"""Loads the compiled operators once and remembers why, if that fails.

The library is a plain shared object with no Python symbols: it registers its operators with the dispatcher of PyTorch when it is
mapped. Loading two copies of it in one process crashes, so it is loaded only if its operators are not there yet.
"""

from __future__ import annotations

from pathlib import Path

import torch

PATH = Path(__file__).with_name("_C.so")

#: Every operator of csrc/bindings/library.cpp. A library built from older sources lacks some: then none of it is used.
OPERATORS = (
    "block_attention",
    "block_attention_backward",
    "cached_block_attention",
    "cpu_level",
    "cuda_architectures",
    "grouped_gemm",
    "grouped_gemm_backward",
    "lm_head_unmask",
    "lm_loss",
    "lm_loss_backward",
    "moe_mlp",
    "moe_mlp_backward",
    "moe_mlp_quantized",
    "moe_routing",
    "moe_routing_backward",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "rope_backward",
    "swiglu",
    "swiglu_backward",
    "threshold_unmask",
)

#: None when the operators are registered, else the reason why they are not. The reference backends serve in that case.
load_error: str | None = None


def _load() -> str | None:
    if not _registered("rms_norm") and (error := _map()) is not None:
        return error
    if missing := [name for name in OPERATORS if not _registered(name)]:
        return f"{PATH.name} was built from other sources: it lacks {', '.join(missing)} (build it again: make install, or pip install .)"
    return None


def _registered(operator: str) -> bool:
    return bool(torch._C._dispatch_has_kernel(f"llada_kernels::{operator}"))


def _map() -> str | None:
    if not PATH.exists():
        return (
            f"{PATH.name} is missing beside {Path(__file__).name}: the package was imported from a source tree in which it was not built "
            "(run 'pip install -e .', or import from outside the source tree)"
        )
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        return f"{error} ({error.__cause__ or 'no further reason'}); built for torch 2.11 or newer, this is {torch.__version__}"
    return None


load_error = _load()

#: Operators that have CUDA kernels in the loaded library: none, unless it was built with LLADA_KERNELS_CUDA.
cuda_operators: frozenset[str] = (
    frozenset(name for name in OPERATORS if torch._C._dispatch_has_kernel_for_dispatch_key(f"llada_kernels::{name}", "CUDA"))
    if load_error is None
    else frozenset()
)
