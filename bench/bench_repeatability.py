"""Whether our ops are bitwise repeatable: 20 calls with one thread and 20 with all (quick: 3), outputs and gradients compared bit by bit.

A row has a time only if all of them agreed; what the time says is little: sizes are chosen so that every op works in parallel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llada_kernels.masks import DiffusionMask
from llada_kernels.ops import QuantizedExperts
from llada_kernels.ops.block_attention import block_attention
from llada_kernels.ops.cached_block_attention import cached_block_attention
from llada_kernels.ops.grouped_gemm import grouped_gemm
from llada_kernels.ops.lm_head_unmask import lm_head_unmask
from llada_kernels.ops.lm_loss import lm_loss
from llada_kernels.ops.moe_mlp import moe_mlp
from llada_kernels.ops.moe_routing import moe_routing
from llada_kernels.ops.rms_norm import rms_norm
from llada_kernels.ops.rope import rope, rope_tables
from llada_kernels.ops.swiglu import swiglu
from llada_kernels.ops.threshold_unmask import threshold_unmask

from .harness import Case, Settings, Variant
from .runner import main
from .shapes import expert_weights, mini_routing

RUNS, BLOCK = 20, 32
Outputs = Sequence[Any]
DTYPES = (torch.bfloat16, torch.float32)


def cases(settings: Settings) -> Iterator[Case]:
    for name, dtype, run in calls(settings.quick):
        if settings.wants(name, dtype):
            yield repeated(name, dtype, run, settings.threads, 3 if settings.quick else RUNS)


def repeated(name: str, dtype: torch.dtype, run: Callable[[], Outputs], threads: int, runs: int = RUNS) -> Case:
    counts = sorted({1, threads})

    def check(first: Outputs) -> str | None:
        before = torch.get_num_threads()
        try:
            for count in counts:
                torch.set_num_threads(count)
                different = sum(not same(first, run()) for _ in range(runs))
                if different:
                    return f"{different} of {runs} calls with {count} threads differ from the first with {before}"
        finally:
            torch.set_num_threads(before)
        return None

    facts = {"bitwise_equal_calls": runs * len(counts), "threads": counts}
    return Case("repeatability", name, dtype, {}, [Variant("native", run, "ours", extra=lambda: facts)], check)


def same(a: Outputs, b: Outputs) -> bool:
    """Equal to the last bit, signs of zeros and NaNs included."""
    return all(x.shape == y.shape and torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().flatten().view(torch.uint8)


def both(run: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Outputs]:
    """A call that returns the output and the gradient of every input."""

    def call() -> Outputs:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = run(*leaves)
        grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float32).view(out.shape).to(out.dtype)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    return call


def forward(op: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[], Outputs]:
    """A call of the native backend that returns the outputs."""

    def call() -> Outputs:
        out = op(*arguments, backend="native", **options)
        return [out] if isinstance(out, Tensor) else list(out)

    return call


def calls(quick: bool) -> Iterator[tuple[str, torch.dtype, Callable[[], Outputs]]]:
    """Name, dtype and call of every op; those that have gradients with them."""
    tokens, experts, hidden, vocab = (192, 16, 128, 4096) if quick else (768, 32, 512, 32768)
    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = dtype, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        mask = DiffusionMask.block_diffusion([0, tokens // 3, tokens], BLOCK)
        q, k, v = normal(2 * tokens, 8, 64), normal(2 * tokens, 2, 64), normal(2 * tokens, 2, 64)
        yield "block_attention", dtype, both(lambda q, k, v, m=mask: block_attention(q, k, v, m, backend="native"), q, k, v)

        pages = tokens // BLOCK
        cached = DiffusionMask.cached([tokens], [BLOCK], BLOCK)
        cache = [normal(pages, BLOCK, 2, 64) for _ in range(2)]
        table = torch.randperm(pages, generator=generator).to(torch.int32)[None]
        arguments = (normal(BLOCK, 8, 64), normal(BLOCK, 2, 64), normal(BLOCK, 2, 64), *cache, table, cached)
        yield "cached_block_attention", dtype, forward(cached_block_attention, *arguments)

        routing = mini_routing(tokens, "uniform", experts=experts)
        gate_up, down = expert_weights(dtype, experts, hidden // 2, hidden)
        x, rows = normal(tokens, hidden), normal(int(routing.offsets[-1]), hidden)
        yield "moe_mlp", dtype, both(
            lambda x, w, g, d, r=routing: moe_mlp(x, r._replace(topk_weights=w), g, d, backend="native"),
            x, routing.topk_weights, gate_up, down,
        )  # fmt: skip
        yield "grouped_gemm", dtype, both(lambda a, b, o=routing.offsets: grouped_gemm(a, b, o, backend="native"), rows, gate_up)
        if dtype == torch.bfloat16:
            for kind in ("int8", "int4"):
                packed = [QuantizedExperts.quantize(w, kind) for w in (gate_up, down)]
                for n in (BLOCK, tokens):
                    few = mini_routing(n, "uniform", experts=experts)
                    yield f"moe_mlp, {kind} experts, {n} tokens", dtype, forward(moe_mlp, x[:n], few, *packed)

        width, head = normal(tokens, hidden), normal(vocab, hidden)
        targets = torch.randint(0, vocab, (tokens,), generator=generator)
        weights = (torch.rand(tokens, generator=generator) < 0.5).float()
        yield "lm_loss", dtype, both(lambda h, w, t=targets, p=weights: lm_loss(h, w, t, p, backend="native").loss, width, head / 16)

        def loss_and_entropy(h: Tensor, w: Tensor, targets: Tensor = targets, weights: Tensor = weights) -> Tensor:
            result = lm_loss(h, w, targets, weights, "all", backend="native")
            assert result.entropy is not None
            return result.loss + result.entropy.sum()

        yield "lm_loss with entropy", dtype, both(loss_and_entropy, width, head / 16)
        masked = torch.full((1, BLOCK), vocab - 1)
        yield "lm_head_unmask", dtype, forward(lm_head_unmask, width[None, :BLOCK], head, masked, vocab - 1, 0.9)
        logits = normal(1, BLOCK, vocab) * 4
        for name, options in (("greedy", {}), ("temperature 1, top_p", {"temperature": 1.0, "top_p": 0.95, "seed": 1})):
            yield f"threshold_unmask, {name}", dtype, forward(threshold_unmask, logits, masked, vocab - 1, 0.9, **options)

        norm_weight = torch.ones(hidden, dtype=dtype)
        yield "rms_norm", dtype, both(lambda x, w: rms_norm(x, w, backend="native"), x, norm_weight)
        cos, sin = rope_tables(torch.arange(tokens), 32, 1e4, dtype)
        yield "rms_norm + residual", dtype, both(
            lambda x, w, r: torch.cat([*rms_norm(x, w, 1e-6, r, backend="native")]), x, norm_weight, normal(tokens, hidden)
        )  # fmt: skip
        yield "rope", dtype, both(lambda q, c=cos, s=sin: rope(q, c, s, backend="native"), normal(tokens, 8, 64))
        yield "rope, q and k with norms", dtype, both(
            lambda q, k, a, b, c=cos, s=sin: torch.cat([*rope(q, c, s, k, a, b, backend="native")], 1),
            normal(tokens, 8, 64), normal(tokens, 2, 64), normal(64), normal(64),
        )  # fmt: skip
        yield "swiglu", dtype, both(lambda x: swiglu(x, backend="native"), normal(tokens, 2 * hidden))
    scores = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
    yield "moe_routing", torch.float32, lambda: list(moe_routing(scores, None, 4, 8, 4, 2.5, backend="native"))


if __name__ == "__main__":
    sys.exit(main("repeatability", cases))
