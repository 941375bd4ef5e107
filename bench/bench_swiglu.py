"""swiglu on the pre-activations of the mini model's shared expert."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import torch

from llada_kernels.ops.swiglu import swiglu

from .elementwise import elementwise
from .harness import Case, Settings
from .runner import main
from .shapes import MINI

OP = importlib.import_module("llada_kernels.ops.swiglu")


def cases(settings: Settings) -> Iterator[Case]:
    width = MINI["I"]
    for rows, backward in ((32, False), (64, True)) if settings.quick else ((32, False), (4096, False), (4096, True)):
        for dtype in (torch.bfloat16, torch.float32):
            gate_up = torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(0)).to(dtype)
            half = gate_up.numel() * gate_up.element_size() / 2
            yield from elementwise(
                "swiglu", OP, f"{rows} x {width} forward{'+backward' if backward else ''}", [gate_up], swiglu, settings,
                shapes={"rows": rows, "width": width}, bytes_moved=half * (8 if backward else 3), backward=backward,
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("swiglu", cases))
