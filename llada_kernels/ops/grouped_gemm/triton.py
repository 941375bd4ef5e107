"""Triton kernels: products of every expert's rows with its weight, forward and backward. moe_mlp is built of them too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _triton
from .._triton import define, define_autograd, triton_reason
from ..dispatch import Backend

#: GPUs on which a tile of 128 x 256 fits: 144 KiB of shared memory, and one operand not in registers (on 8.0 SwiGLU would spill).
_WIDE = (90, 100, 103)


def row_tile(rows: int, experts: int, inner: int, x: Tensor, wide: bool = True) -> dict[str, Any]:
    """Tile of a product of each expert's rows with its weight: BM rows, BN columns, BK of the ``inner`` columns at a time.

    Few rows per expert: the weights' bytes decide, so they are the 128 rows of the tensor cores' first operand (SWAP), the tokens are
    its 16 or 64 columns, and 4 stages of 16 KiB in each of 2 or 3 programs keep more bytes in flight than the 33 KiB per
    multiprocessor that 4.3 TB/s need. Many rows: arithmetic and the L2 cache decide. Tiles of 128 x 256 read 1 byte of it per 85
    operations, but then a multiprocessor runs one program, whose start and end nothing hides: where the sum is short or not ``wide``,
    two of 128 x 128.
    """
    mean, arch = rows / experts, _triton.capability(x.device)
    swap = mean <= 48
    small = 16 if mean <= 8 else 64
    if x.dtype == torch.float32 or inner % 64:  # no tensor cores, exact products only; masks along the sum, which take registers
        return {"BM": min(small, 32), "BN": 64, "BK": 32, "SWAP": swap, "num_warps": 4, "num_stages": 2}
    if swap:
        return {"BM": small, "BN": 128, "BK": 64, "SWAP": True, "num_warps": 4, "num_stages": 4}
    wide = wide and inner >= 1024 and arch in _WIDE
    return {"BM": 128, "BN": 256 if wide else 128, "BK": 64, "SWAP": False, "num_warps": 8, "num_stages": 3}


def quantized_tile(rows: int, experts: int, inner: int, x: Tensor) -> dict[str, Any]:
    """row_tile for int8 and int4 weights. They are always the first operand, which may be in registers: there they become x's dtype.

    The floor is the bytes of the experts in use: 3.34 MB (int8) or 1.77 MB (int4, groups of 32) each at the mini geometry, so at 4.0 TB/s
    136 or 72 us for the 163 experts of 32 tokens. 128 columns at a time are 16 or 8 KiB of weights, 128 or 64 bytes of a row, and 8 or 4
    bytes of its scales (groups of 32 or 64), which asynchronous copies take; the 2 bytes of groups of 128 they do not, and are waited for.
    Registers let 2 or 3 programs run on a multiprocessor of 9.0, each with 3 stages of weights: 48 KiB and more, as there. Tiles of 64
    rows would spill, since beside their sums a thread holds 64 or 128 weights in x's dtype.

    Arithmetic has a floor too. For a weight the compiler makes 6 to 7 instructions, of which 132 multiprocessors at 1.8 GHz have 3e13 per
    second: 4.5e12 weights, 2.5 TB/s of int4 and 4.8 TB/s of int8. So int4 will be bound by arithmetic on a GPU that reads 4 TB/s (114 us
    for those experts), and by memory on one that reads 1 TB/s. Nothing of this was measured yet.
    """
    few = rows <= 8 * experts
    if x.dtype == torch.float32 or inner % 64:  # as there; the columns are a multiple of 32
        tile, full = {"BN": 64, "BK": 32, "num_stages": 2}, True
    else:
        tile, full = {"BN": 128, "BK": 64 if inner % 128 else 128, "num_stages": 4}, not few
    # Where no limit is named, ptxas spills 16 bytes of some kernels so that one program more has registers.
    return {**tile, "BM": 16 if few else 32, "SWAP": True, "num_warps": 4, "maxnreg": 255 if full else None}


def quantization(words: Tensor, scales: Tensor | None, inner: int) -> dict[str, int]:
    """What kernels must know of a weight of ``inner`` columns: bits and columns that share a scale; 0 without scales."""
    if scales is None:
        return {"BITS": 0, "GROUP": 0}
    return {"BITS": words.shape[2] * 16 // inner, "GROUP": inner // scales.shape[2]}


def row_grid(rows: int, experts: int, columns: int, tile: dict[str, Any], columns_of_tile: int | None = None) -> tuple[int]:
    """At least as many programs as there are tiles, whatever the offsets."""
    return ((rows // tile["BM"] + min(experts, rows)) * -(-columns // (columns_of_tile or tile["BN"])),)


def multiply_rows(
    a: Tensor, b: Tensor, out: Tensor, offsets: Tensor, permutation: Tensor | None = None, transposed: bool = False,
    scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out = a @ b[e].T (``transposed``: a @ b[e]) of each expert's rows; row r is stored as row ``permutation[r]``. All contiguous.

    With ``scales`` b is quantised, int16 words [E, N, K * bits / 16].
    """
    from . import triton_kernels

    rows, inner = a.shape
    experts, columns = b.shape[0], out.shape[1]
    if out.numel():
        # Transposed and wide, Triton 3.6 spills 296 bytes where the rest of an expert takes half a tile; 3.7 has 255 registers and none.
        tile = row_tile(rows, experts, inner, a, wide=not transposed) if scales is None else quantized_tile(rows, experts, inner, a)
        if transposed and tile["SWAP"] and tile["BM"] == 64:  # 4 warps spill 624 bytes with Triton 3.9
            tile["num_warps"] = 8
        triton_kernels.rows_kernel[row_grid(rows, experts, columns, tile)](
            a, b, b if scales is None else scales, out, offsets, offsets if permutation is None else permutation,
            EXPERTS=experts, N=columns, INNER=inner, TRANSPOSED=transposed, SCATTER=permutation is not None,
            **quantization(b, scales, inner), **tile,
        )  # fmt: skip
    return out


def weight_gradient(
    left: Tensor, right: Tensor, out: Tensor, offsets: Tensor, permutation: Tensor | None = None, left_top_k: int = 0, right_top_k: int = 0
) -> Tensor:
    """out[e] = left.T @ right over the rows of expert e. With a top_k, row r of that operand is row ``permutation[r] // top_k``."""
    from . import triton_kernels

    experts, m, n = out.shape
    rows = left.shape[0] if permutation is None else permutation.shape[0]
    if out.numel():
        # As row_tile: tiles of 128 x 256 where the sum over the rows is long.
        tile = {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}
        if left.dtype == torch.float32:
            tile = {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
        elif rows >= 1024 * experts and _triton.capability(left.device) in _WIDE:
            tile["BN"] = 256
        if permutation is not None:
            tile["num_stages"] += 2  # row numbers are loaded ahead of their rows, which are to be as early as without
        triton_kernels.weight_gradient_kernel[(experts * -(-m // tile["BM"]) * -(-n // tile["BN"]),)](
            left, right, out, offsets, offsets if permutation is None else permutation,
            EXPERTS=experts, M=m, N=n, LEFT_TOP_K=left_top_k, RIGHT_TOP_K=right_top_k, **tile,
        )  # fmt: skip
    return out


def _forward(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return multiply_rows(a.contiguous(), b.contiguous(), a.new_empty(a.shape[0], b.shape[1]), offsets.contiguous())


def _forward_fake(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _backward(grad: Tensor, a: Tensor, b: Tensor, offsets: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor]:
    grad, a, b, offsets = grad.contiguous(), a.contiguous(), b.contiguous(), offsets.contiguous()
    grad_a, grad_b = _backward_fake(grad, a, b, offsets, need_a, need_b)
    if need_a:
        multiply_rows(grad, b, grad_a, offsets, transposed=True)
    if need_b:
        weight_gradient(grad, a, grad_b, offsets)
    return grad_a, grad_b


def _backward_fake(grad: Tensor, a: Tensor, b: Tensor, offsets: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape if need_a else 0), b.new_empty(b.shape if need_b else 0)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_a, need_b, _ = ctx.needs_input_grad
    grads = torch.ops.llada_kernels_triton.grouped_gemm_backward(grad, *ctx.saved_tensors, need_a, need_b)
    return grads[0] if need_a else None, grads[1] if need_b else None, None


define("grouped_gemm(Tensor a, Tensor b, Tensor offsets) -> Tensor", _forward, _forward_fake)
define(
    "grouped_gemm_backward(Tensor grad, Tensor a, Tensor b, Tensor offsets, bool need_a, bool need_b) -> (Tensor, Tensor)",
    _backward, _backward_fake,
)  # fmt: skip
define_autograd("grouped_gemm", _autograd, _setup_context)


def _grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return torch.ops.llada_kernels_triton.grouped_gemm(a, b, offsets)


BACKEND = Backend("triton", triton_reason, _grouped_gemm)
