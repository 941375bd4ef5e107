"""rms_norm over hidden states of the mini model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from llada_kernels.ops.rms_norm import rms_norm

from .elementwise import elementwise
from .harness import Case, Settings
from .runner import main
from .shapes import MINI

OP = importlib.import_module("llada_kernels.ops.rms_norm")


def cases(settings: Settings) -> Iterator[Case]:
    width = MINI["H"]
    for rows, backward in ((32, False), (64, True)) if settings.quick else ((32, False), (4096, False), (4096, True)):
        for dtype in (torch.bfloat16, torch.float32):
            generator = torch.Generator().manual_seed(0)
            x, weight = torch.randn(rows, width, generator=generator).to(dtype), torch.rand(width, generator=generator).to(dtype)
            moved = x.numel() * x.element_size() * (5 if backward else 2)  # read, write; then read x and the gradient, write
            yield from elementwise(
                "rms_norm", OP, f"{rows} x {width} forward{'+backward' if backward else ''}", [x, weight], rms_norm, settings,
                shapes={"rows": rows, "hidden": width}, bytes_moved=moved, backward=backward,
                others={"F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6)},
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("rms_norm", cases))
