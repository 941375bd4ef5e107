"""Where Python looks at a tensor's values: on a GPU each look waits for everything that was queued."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


@contextmanager
def host_reads(folder: str) -> Iterator[list[str]]:
    """Collects a name for each read by code of files whose path has ``folder`` in it."""
    seen: list[str] = []

    def watched(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if folder in sys._getframe(1).f_code.co_filename:
                seen.append(name)
            return original(self, *args, **kwargs)

        return read

    own = {name: vars(torch.Tensor).get(name) for name in READS}
    try:
        for name in READS:
            setattr(torch.Tensor, name, watched(name))
        yield seen
    finally:
        for name, method in own.items():
            if method is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, method)
