"""Loads the compiled operators once and remembers why, if that fails.

The library is a plain shared object with no Python symbols: it registers its operators with the dispatcher of PyTorch when it is
mapped. Loading two copies of it in one process crashes, so it is loaded only if its operators are not there yet.
"""

from __future__ import annotations

from pathlib import Path

import torch

PATH = Path(__file__).with_name("_C.so")

#: None when the operators are registered, else the reason why they are not. The reference backends serve in that case.
load_error: str | None = None


def _load() -> str | None:
    if torch._C._dispatch_has_kernel("llada_kernels::rms_norm"):
        return None
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
