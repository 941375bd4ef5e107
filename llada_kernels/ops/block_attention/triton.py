"""Triton kernels: query tiles of the mask's plan for the output and grad_q, key tiles for grad_k and grad_v. No atomics.

The heads of a group are rows of one tile, so a tile of 128 rows is one diffusion block of 32 tokens times 4 heads, and K and V are read
once for all of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...masks import GPU_BLOCK_M, GPU_BLOCK_N, DiffusionMask
from .. import _triton
from .._triton import define, define_autograd, triton_reason
from ..dispatch import Backend

HEAD_DIMS = (64, 128)
#: A key tile's step holds all heads of a group: 16 rows are the fewest.
MAX_GROUP = 16


def attention_reason(scale: float, q: Tensor, k: Tensor, *others: Tensor) -> str | None:
    """Why the Triton kernels cannot serve these tensors, or None."""
    reason = triton_reason(q, k, *others)
    if reason is None and q.shape[1] // k.shape[1] > MAX_GROUP:
        return f"triton serves at most {MAX_GROUP} query heads per KV head, got {q.shape[1] // k.shape[1]}"
    if reason is None and q.shape[-1] not in HEAD_DIMS:
        return f"triton serves head dims 64 and 128, got {q.shape[-1]}"
    if reason is None and not scale > 0:
        return f"triton serves a softmax_scale above 0, got {scale}"
    return reason


def heads_per_tile(group: int, block_m: int) -> int:
    """Query heads of a group in a tile of ``block_m`` rows, at most 4: with 32 tokens or more, the sizes of the mask's plans."""
    return min(1 << (group - 1).bit_length(), max(1, block_m // 32), 4)


def programs_per_tile(group: int, tokens: int, block_m: int) -> tuple[int, int]:
    """Heads in a program's tile, and programs for the ``tokens`` of a plan's tile and the ``group`` heads of a KV head."""
    heads = heads_per_tile(group, block_m)
    return heads, tokens // (block_m // heads) * -(-group // heads)


def shared_memory(arch: int) -> int:
    """KiB of shared memory of a block on a GPU of this compute capability."""
    return 227 if arch in (90, 100, 103) else 163 if arch in (80, 87) else 99


def query_tiles(dtype: torch.dtype, arch: int) -> dict[str, int]:
    """Sizes of :func:`forward_kernel`."""
    if dtype == torch.float32 and not _triton.interpreting:  # products in three passes of TF32: registers decide
        return {"BLOCK_M": 32, "BLOCK_N": 16, "TAIL_N": 16, "TAIL_STAGES": 1, "num_warps": 8, "num_stages": 2}
    if shared_memory(arch) >= 227:  # q 32 KiB and three stages of k and v, 64 KiB each
        return {"BLOCK_M": 128, "BLOCK_N": 128, "TAIL_N": 64, "TAIL_STAGES": 1, "num_warps": 8, "num_stages": 3}
    stages = 3 if shared_memory(arch) >= 163 else 2
    return {"BLOCK_M": 128, "BLOCK_N": 64, "TAIL_N": 32, "TAIL_STAGES": 1, "num_warps": 8, "num_stages": stages}


def grad_query_tiles(dtype: torch.dtype, arch: int) -> dict[str, int]:
    """Sizes of :func:`grad_q_kernel`: two tiles of scores are alive, so they are half as wide as in the forward."""
    if dtype == torch.float32 and not _triton.interpreting:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "TAIL_N": 16, "TAIL_STAGES": 1, "num_warps": 4, "num_stages": 1}
    if shared_memory(arch) >= 227:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "TAIL_N": 32, "TAIL_STAGES": 2, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "TAIL_N": 32, "TAIL_STAGES": 1, "num_warps": 8, "num_stages": 2}


def key_tiles(dtype: torch.dtype, arch: int) -> dict[str, int]:
    """Sizes of :func:`grad_kv_kernel`: 128 keys and 8 warps hold both gradients in 128 registers per thread."""
    if dtype == torch.float32 and not _triton.interpreting:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "MASKED_STAGES": 1, "num_warps": 4, "num_stages": 1}
    if shared_memory(arch) >= 227:
        return {"BLOCK_M": 64, "BLOCK_N": 128, "MASKED_STAGES": 1, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "MASKED_STAGES": 1, "num_warps": 8, "num_stages": 2}


def tokens_contiguous(x: Tensor) -> Tensor:
    """x [T, heads, D] with the heads of a token side by side; slices of a fused projection pass as they are."""
    fits = x.stride(2) == 1 and x.stride(1) == x.shape[2] and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.contiguous()


def _supports(q: Tensor, k: Tensor, v: Tensor, mask: DiffusionMask | Tensor, scale: float) -> str | None:
    if isinstance(mask, Tensor):
        return "a dense mask is served by the reference only (DiffusionMask.from_dense finds the intervals)"
    return attention_reason(scale, q, k, v)


def _block_attention(q: Tensor, k: Tensor, v: Tensor, mask: DiffusionMask, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    sizes = query_tiles(q.dtype, _triton.capability(q.device))
    tokens = sizes["BLOCK_M"] // heads_per_tile(group, sizes["BLOCK_M"])
    plan = mask.tile_plan(max(tokens, GPU_BLOCK_M[0]))
    keys = mask.key_plan()
    out, _ = torch.ops.llada_kernels_triton.block_attention(
        q, k, v, mask.context, mask.own, plan.tiles, plan.order, keys.offsets, keys.stretches, keys.order, plan.block_m, scale
    )
    return out


def _forward(
    q: Tensor, k: Tensor, v: Tensor, context: Tensor, own: Tensor, tiles: Tensor, order: Tensor,
    offsets: Tensor, stretches: Tensor, key_order: Tensor, tokens: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from . import triton_kernels

    q, k, v = (tokens_contiguous(x) for x in (q, k, v))
    heads, dim, kv_heads = q.shape[1], q.shape[2], k.shape[1]
    sizes = query_tiles(q.dtype, _triton.capability(q.device))
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    if len(tiles):
        packed, programs = programs_per_tile(heads // kv_heads, tokens, sizes["BLOCK_M"])
        triton_kernels.forward_kernel[(len(tiles) * kv_heads * programs,)](
            q, k, v, out, lse, context, own, tiles, order, q.stride(0), k.stride(0), v.stride(0), scale * math.log2(math.e),
            Q_HEADS=heads, KV_HEADS=kv_heads, D=dim, HEADS=packed, TOKENS=tokens, **sizes,
        )  # fmt: skip
    return out, lse


def _forward_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def num_splits(num_keys: int, kv_heads: int, sms: int) -> int:
    """Shares of a key tile's queries: with few tiles per multiprocessor the longest ones would hold up the rest.

    In the training layout half of the tiles are noisy and short, and the work of the others falls from twice the mean to nothing.
    """
    tiles = -(-num_keys // GPU_BLOCK_N) * kv_heads
    return min(8, max(1, -(-3 * sms // max(tiles, 1))))


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, context: Tensor, own: Tensor, tiles: Tensor, order: Tensor,
    offsets: Tensor, stretches: Tensor, key_order: Tensor, tokens: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from . import triton_kernels

    grad_out, q, k, v = (tokens_contiguous(x) for x in (grad_out, q, k, v))
    heads, dim, kv_heads, num_keys = q.shape[1], q.shape[2], k.shape[1], k.shape[0]
    arch, group = _triton.capability(q.device), heads // kv_heads
    sizes = grad_query_tiles(q.dtype, arch)
    grad_q, delta = q.new_empty(q.shape), torch.empty_like(lse)
    strides = (grad_out.stride(0), q.stride(0), k.stride(0), v.stride(0), scale * math.log2(math.e), scale)
    if len(tiles):
        packed, programs = programs_per_tile(group, tokens, sizes["BLOCK_M"])
        triton_kernels.grad_q_kernel[(len(tiles) * kv_heads * programs,)](
            grad_out, q, k, v, out, lse, context, own, tiles, order, grad_q, delta, *strides,
            Q_HEADS=heads, KV_HEADS=kv_heads, D=dim, HEADS=packed, TOKENS=tokens, **sizes,
        )  # fmt: skip
    if len(key_order) == 0:
        return grad_q, k.new_empty(k.shape), k.new_empty(k.shape)
    sizes = key_tiles(q.dtype, arch)
    splits = num_splits(num_keys, kv_heads, _triton.num_sms(q.device))
    grads = k.new_empty(k.shape), k.new_empty(k.shape)
    parts = grads if splits == 1 else k.new_empty(2, splits, *k.shape, dtype=torch.float32)
    programs = GPU_BLOCK_N // sizes["BLOCK_N"] * splits
    triton_kernels.grad_kv_kernel[(len(key_order) * kv_heads * programs,)](
        grad_out, q, k, v, lse, delta, context, own, offsets, stretches, key_order, *parts, *strides, num_keys, splits,
        Q_HEADS=heads, KV_HEADS=kv_heads, D=dim, HEADS=1 << (group - 1).bit_length(), PLAN_N=GPU_BLOCK_N, **sizes,
    )  # fmt: skip
    if splits > 1:
        for part, grad in zip(parts, grads, strict=True):
            size = grad.numel()
            triton_kernels.sum_splits_kernel[(-(-size // 1024),)](part, grad, size, splits, BLOCK=1024, num_warps=4)
    return grad_q, *grads


def _backward_fake(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.tokens, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(*tensors, out, lse)
    ctx.mark_non_differentiable(lse)


def _autograd(ctx: Any, grad_out: Tensor, _grad_lse: Any) -> tuple[Tensor | None, ...]:
    q, k, v, *plan, out, lse = ctx.saved_tensors
    grads = torch.ops.llada_kernels_triton.block_attention_backward(grad_out, q, k, v, out, lse, *plan, ctx.tokens, ctx.scale)
    return *grads, *[None] * 9


_QKV = "Tensor q, Tensor k, Tensor v"
_MASK = "Tensor context, Tensor own, Tensor tiles, Tensor order, Tensor offsets, Tensor stretches, Tensor key_order, int tokens"
define(f"block_attention({_QKV}, {_MASK}, float scale) -> (Tensor, Tensor)", _forward, _forward_fake)
define(
    f"block_attention_backward(Tensor grad_out, {_QKV}, Tensor out, Tensor lse, {_MASK}, float scale) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
define_autograd("block_attention", _autograd, _setup_context)

BACKEND: Backend = Backend("triton", _supports, _block_attention)
