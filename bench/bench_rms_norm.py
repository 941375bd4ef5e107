"""rms_norm over hidden states of the mini model, alone and with the residual added first."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

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
            name, shapes = f"{rows} x {width}{{}} forward{'+backward' if backward else ''}", {"rows": rows, "hidden": width}
            yield from elementwise(
                "rms_norm", OP, name.format(""), [x, weight], rms_norm, settings, shapes=shapes, bytes_moved=moved, backward=backward,
                others={"F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6)},
            )  # fmt: skip
            residual = torch.randn(rows, width, generator=generator).to(dtype)
            yield from elementwise(
                "rms_norm", OP, name.format(" + residual"), [x, weight, residual], with_residual, settings, shapes=shapes,
                bytes_moved=2 * moved, backward=backward, others={"sum, then rms_norm": in_two_steps},
            )  # fmt: skip


def with_residual(x: Tensor, weight: Tensor, residual: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    return rms_norm(x, weight, 1e-6, residual, backend=backend)


def in_two_steps(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, 1e-6), total


if __name__ == "__main__":
    sys.exit(main("rms_norm", cases))
