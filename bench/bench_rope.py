"""rope on the queries of the mini model: the first 64 of 128 dims turn."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import torch

from llada_kernels.ops.rope import rope, rope_tables

from .elementwise import elementwise
from .harness import Case, Settings
from .runner import main
from .shapes import MINI

OP = importlib.import_module("llada_kernels.ops.rope")


def cases(settings: Settings) -> Iterator[Case]:
    heads, dim = MINI["Hq"], MINI["D"]
    for tokens, backward in ((32, False), (64, True)) if settings.quick else ((32, False), (4096, False), (4096, True)):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(tokens, heads, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
            cos, sin = rope_tables(torch.arange(tokens), dim // 2, 600000.0, dtype)
            yield from elementwise(
                "rope", OP, f"{tokens} tokens forward{'+backward' if backward else ''}", [x, cos, sin], rope, settings,
                shapes={"tokens": tokens, "heads": heads, "head_dim": dim, "rotary_dim": dim // 2},
                bytes_moved=x.numel() * x.element_size() * (4 if backward else 2), backward=backward,
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("rope", cases))
