"""rope on the queries of the mini model, and on queries and keys with their norms: the first 64 of 128 dims turn."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from llada_kernels.ops.rms_norm import rms_norm
from llada_kernels.ops.rope import rope, rope_tables

from .elementwise import elementwise
from .harness import Case, Settings
from .runner import main
from .shapes import MINI

OP = importlib.import_module("llada_kernels.ops.rope")


def cases(settings: Settings) -> Iterator[Case]:
    heads, kv, dim = MINI["Hq"], MINI["Hkv"], MINI["D"]
    for tokens, backward in ((32, False), (64, True)) if settings.quick else ((32, False), (4096, False), (4096, True)):
        for dtype in (torch.bfloat16, torch.float32):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(tokens, heads, dim, generator=generator).to(dtype)
            cos, sin = rope_tables(torch.arange(tokens), dim // 2, 600000.0, dtype)
            name, shapes = f"{tokens} tokens{{}} forward{'+backward' if backward else ''}", {"tokens": tokens, "heads": heads}
            shapes |= {"head_dim": dim, "rotary_dim": dim // 2}
            moved = x.element_size() * tokens * dim * (4 if backward else 2)
            yield from elementwise(
                "rope", OP, name.format(""), [x, cos, sin], rope, settings, shapes=shapes, bytes_moved=heads * moved, backward=backward,
            )  # fmt: skip
            qkv = torch.randn(tokens, heads + 2 * kv, dim, generator=generator).to(dtype)
            weights = [torch.rand(dim, generator=generator).to(dtype) for _ in range(2)]
            yield from elementwise(
                "rope", OP, name.format(", q and k with norms"), [qkv, cos, sin, *weights], with_norms, settings,
                shapes={**shapes, "kv_heads": kv}, bytes_moved=(heads + kv) * moved, backward=backward,
                others={"rms_norm, then rope": in_two_steps},
            )  # fmt: skip


def with_norms(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    q, k, _ = qkv.split([MINI["Hq"], MINI["Hkv"], MINI["Hkv"]], dim=1)
    return rope(q, cos, sin, k, q_weight, k_weight, backend=backend)


def in_two_steps(qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    q, k, _ = qkv.split([MINI["Hq"], MINI["Hkv"], MINI["Hkv"]], dim=1)
    return rope(rms_norm(q, q_weight), cos, sin), rope(rms_norm(k, k_weight), cos, sin)


if __name__ == "__main__":
    sys.exit(main("rope", cases))
