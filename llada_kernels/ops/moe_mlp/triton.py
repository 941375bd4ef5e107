"""Triton kernels: gate and up with SwiGLU, down to slot order, weighted sum; the backward of the same parts. No atomics, no syncs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _triton
from .._triton import define, define_autograd, triton_reason
from ..dispatch import Backend
from ..grouped_gemm.triton import multiply_rows, quantization, quantized_tile, row_grid, row_tile, weight_gradient
from ..moe_routing.routing import Routing
from ..quantized_experts import FP8_BLOCK, GROUP_SIZES, QuantizedExperts


def _supports(x: Tensor, routing: Routing, w_gate_up: Tensor | QuantizedExperts, w_down: Tensor | QuantizedExperts) -> str | None:
    weights = [w for w in (w_gate_up, w_down) if isinstance(w, QuantizedExperts)]
    kinds = [w.kind for w in weights]
    if "fp8" in kinds and set(kinds) != {"fp8"}:
        return f"triton serves int8 and int4 experts, or both weights in fp8, got {' and '.join(kinds)}"
    if unserved := [w.group_size for w in weights if w.group_size not in GROUP_SIZES]:
        return f"triton serves groups of {', '.join(map(str, GROUP_SIZES))} columns, got {unserved[0]}"
    if routing.topk_weights.dtype != torch.float32:
        return f"triton serves topk_weights in float32, got {routing.topk_weights.dtype}"
    return triton_reason(x, *routing, *(w.data if isinstance(w, QuantizedExperts) else w for w in (w_gate_up, w_down)))


def moe_mlp(x: Tensor, routing: Routing, w_gate_up: Tensor | QuantizedExperts, w_down: Tensor | QuantizedExperts) -> Tensor:
    """See :func:`llada_kernels.ops.moe_mlp`."""
    if isinstance(w_gate_up, QuantizedExperts) or isinstance(w_down, QuantizedExperts):
        assert isinstance(w_gate_up, QuantizedExperts) and isinstance(w_down, QuantizedExperts)
        weights = (w_gate_up.data, w_gate_up.scales, w_down.data, w_down.scales)
        op = torch.ops.llada_kernels_triton.moe_mlp_fp8 if w_gate_up.kind == "fp8" else torch.ops.llada_kernels_triton.moe_mlp_integers
        return op(x, routing.topk_weights, routing.offsets, routing.permutation, *weights)
    tensors = (x, routing.topk_weights, routing.offsets, routing.permutation, w_gate_up, w_down)
    # Gate and up are kept only where a backward may follow.
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return torch.ops.llada_kernels_triton.moe_mlp(*tensors, save)[0]


def combine(rows: Tensor, topk_weights: Tensor, out: Tensor, weighted: bool) -> Tensor:
    """out [T, H] = sum over a token's slots of rows [T * K, H], in the order of k."""
    from . import triton_kernels

    if out.numel():
        hidden, columns = out.shape[1], min(1024, max(128, 1 << (out.shape[1] - 1).bit_length()))
        triton_kernels.combine_kernel[(out.shape[0] * -(-hidden // columns),)](
            rows, topk_weights, out, HIDDEN=hidden, TOP_K=topk_weights.shape[1], WEIGHTED=weighted, COLUMNS=columns, num_warps=4
        )
    return out


def _forward(
    x: Tensor, topk_weights: Tensor, offsets: Tensor, permutation: Tensor, w_gate_up: Tensor, w_down: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    tensors = (t.contiguous() for t in (x, topk_weights, offsets, permutation, w_gate_up, w_down))
    x, topk_weights, offsets, permutation, w_gate_up, w_down = tensors
    kept = x.new_empty(permutation.shape[0] if save else 0, w_gate_up.shape[1])
    return _products(x, topk_weights, offsets, permutation, w_gate_up, w_down, None, None, kept if save else None), kept


def _products(
    x: Tensor, topk_weights: Tensor, offsets: Tensor, permutation: Tensor, w_gate_up: Tensor, w_down: Tensor,
    gate_up_scales: Tensor | None, down_scales: Tensor | None, kept: Tensor | None,
) -> Tensor:  # fmt: skip
    """The result; with ``kept`` gate and up go there. Weights with scales are quantised, as int16 words. All contiguous."""
    from . import triton_kernels

    experts, hidden, width = w_down.shape[0], x.shape[1], w_gate_up.shape[1] // 2
    slots = permutation.shape[0]
    act = x.new_empty(slots, width)
    if act.numel():
        tile = (row_tile if gate_up_scales is None else quantized_tile)(slots, experts, hidden, x)
        triton_kernels.gate_up_kernel[row_grid(slots, experts, width, tile, tile["BN"] // 2)](
            x, w_gate_up, w_gate_up if gate_up_scales is None else gate_up_scales, act, act if kept is None else kept, offsets, permutation,
            EXPERTS=experts, HIDDEN=hidden, WIDTH=width, TOP_K=topk_weights.shape[1], KEEP=kept is not None,
            **quantization(w_gate_up, gate_up_scales, hidden), **tile,
        )  # fmt: skip
    rows = multiply_rows(act, w_down, x.new_empty(slots, hidden), offsets, permutation, scales=down_scales)
    return combine(rows, topk_weights, x.new_empty(x.shape), True)


def _forward_fake(
    x: Tensor, topk_weights: Tensor, offsets: Tensor, permutation: Tensor, w_gate_up: Tensor, w_down: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(permutation.shape[0] if save else 0, w_gate_up.shape[1])


def _integers(
    x: Tensor, topk_weights: Tensor, offsets: Tensor, permutation: Tensor, w_gate_up: Tensor, gate_up_scales: Tensor, w_down: Tensor,
    down_scales: Tensor,
) -> Tensor:  # fmt: skip
    tensors = (t.contiguous() for t in (x, topk_weights, offsets, permutation, w_gate_up, w_down, gate_up_scales, down_scales))
    x, topk_weights, offsets, permutation, w_gate_up, w_down, gate_up_scales, down_scales = tensors
    words = w_gate_up.view(torch.int16), w_down.view(torch.int16)
    return _products(x, topk_weights, offsets, permutation, *words, gate_up_scales, down_scales, None)


def _fp8(
    x: Tensor, topk_weights: Tensor, offsets: Tensor, permutation: Tensor, w_gate_up: Tensor, gate_up_scales: Tensor, w_down: Tensor,
    down_scales: Tensor,
) -> Tensor:  # fmt: skip
    from . import triton_kernels

    tensors = (t.contiguous() for t in (x, topk_weights, offsets, permutation, gate_up_scales, down_scales))
    x, topk_weights, offsets, permutation, gate_up_scales, down_scales = tensors
    experts, hidden, width = w_down.shape
    slots, tokens = permutation.shape[0], x.shape[0]
    out, rows = x.new_empty(x.shape), x.new_empty(slots, hidden)
    if not rows.numel():
        return out
    native = _triton.capability(x.device) >= 89
    # The bytes of e4m3 weights, for tensor cores that do not know them.
    gate_up, down = (w.contiguous() if native else w.contiguous().view(torch.uint8) for w in (w_gate_up, w_down))
    kind = torch.float8_e4m3fn if native else torch.float16
    xs, x_scales = x.new_empty(x.shape, dtype=kind), topk_weights.new_empty(tokens, hidden // FP8_BLOCK)
    act, act_scales = x.new_empty(slots, width, dtype=kind), topk_weights.new_empty(slots, width // FP8_BLOCK)
    groups = x_scales.numel()
    triton_kernels.quantize_kernel[(-(-groups // 16),)](x, xs, x_scales, groups, NATIVE=native, GROUPS=16, num_warps=4)
    # As row_tile for few rows: 32 KiB of gate and up rows at a time, 16 KiB of down rows.
    tile: dict[str, Any] = {"BM": 16 if slots <= 8 * experts else 64, "NATIVE": native}
    wide = {"num_warps": 4 if tile["BM"] == 16 else 8, "STAGES": 3}
    triton_kernels.gate_up_e4m3_kernel[row_grid(slots, experts, width, tile, FP8_BLOCK)](
        xs, x_scales, gate_up, gate_up_scales, act, act_scales, offsets, permutation,
        EXPERTS=experts, HIDDEN=hidden, WIDTH=width, TOP_K=topk_weights.shape[1], DTYPE=triton_kernels.dtype_of(x.dtype), **tile, **wide,
    )  # fmt: skip
    triton_kernels.down_e4m3_kernel[row_grid(slots, experts, hidden, tile, FP8_BLOCK)](
        act, act_scales, down, down_scales, rows, offsets, permutation,
        EXPERTS=experts, HIDDEN=hidden, WIDTH=width, **tile, num_warps=4, STAGES=4,
    )  # fmt: skip
    return combine(rows, topk_weights, out, True)


def _quantized_fake(x: Tensor, *others: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _backward(
    grad_out: Tensor, x: Tensor, topk_weights: Tensor, offsets: Tensor, permutation: Tensor, w_gate_up: Tensor, w_down: Tensor,
    kept: Tensor, need_x: bool, need_w_gate_up: bool, need_w_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from . import triton_kernels

    tensors = (t.contiguous() for t in (grad_out, x, topk_weights, offsets, permutation, w_gate_up, w_down, kept))
    grad_out, x, topk_weights, offsets, permutation, w_gate_up, w_down, kept = tensors
    grad_x, _, grad_w_gate_up, grad_w_down = _backward_fake(
        grad_out, x, topk_weights, offsets, permutation, w_gate_up, w_down, kept, need_x, need_w_gate_up, need_w_down
    )
    experts, hidden, width = w_down.shape
    slots, top_k = permutation.shape[0], topk_weights.shape[1]
    grad_gate_up, act = x.new_empty(slots, 2 * width), x.new_empty(slots, width)
    tile = row_tile(slots, experts, hidden, x, wide=False)
    # Two programs of 8 warps on a multiprocessor; on 8.0, where a product's operands are in registers too, they would spill.
    registers = 128 if tile["num_warps"] == 8 and _triton.capability(x.device) >= 90 else None
    dots = topk_weights.new_empty(-(-width // tile["BN"]), slots)
    if act.numel():
        triton_kernels.activation_gradient_kernel[row_grid(slots, experts, width, tile)](
            grad_out, w_down, kept, topk_weights, grad_gate_up, act, dots, offsets, permutation, slots,
            EXPERTS=experts, HIDDEN=hidden, WIDTH=width, TOP_K=top_k, **tile, maxnreg=registers,
        )  # fmt: skip
    if need_w_down:
        weight_gradient(grad_out, act, grad_w_down, offsets, permutation, left_top_k=top_k)
    if need_w_gate_up:
        weight_gradient(grad_gate_up, x, grad_w_gate_up, offsets, permutation, right_top_k=top_k)
    if need_x:
        rows = multiply_rows(grad_gate_up, w_gate_up, x.new_empty(slots, hidden), offsets, permutation, transposed=True)
        combine(rows, topk_weights, grad_x, False)
    return grad_x, dots.sum(0).view_as(topk_weights), grad_w_gate_up, grad_w_down


def _backward_fake(
    grad_out: Tensor, x: Tensor, topk_weights: Tensor, offsets: Tensor, permutation: Tensor, w_gate_up: Tensor, w_down: Tensor,
    kept: Tensor, *need: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    grad_x, *weights = (t.new_empty(t.shape if wanted else 0) for t, wanted in zip((x, w_gate_up, w_down), need, strict=True))
    return grad_x, topk_weights.new_empty(topk_weights.shape), *weights


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, weights, _, _, w_gate_up, w_down, _ = ctx.needs_input_grad
    grads = torch.ops.llada_kernels_triton.moe_mlp_backward(grad_out, *ctx.saved_tensors, x, w_gate_up, w_down)
    wanted = ((0, x), (1, weights), (None, False), (None, False), (2, w_gate_up), (3, w_down), (None, False))
    return tuple(grads[i] if want else None for i, want in wanted)


_INPUTS = "Tensor x, Tensor topk_weights, Tensor offsets, Tensor permutation, Tensor w_gate_up, Tensor w_down"
define(f"moe_mlp({_INPUTS}, bool save) -> (Tensor, Tensor)", _forward, _forward_fake)
define(
    f"moe_mlp_backward(Tensor grad_out, {_INPUTS}, Tensor kept, bool x_grad, bool gate_up_grad, bool down_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward, _backward_fake,
)  # fmt: skip
define_autograd("moe_mlp", _autograd, _setup_context)
_QUANTIZED_INPUTS = (
    "Tensor x, Tensor topk_weights, Tensor offsets, Tensor permutation, Tensor gate_up_data, Tensor gate_up_scales, "
    "Tensor down_data, Tensor down_scales"
)
define(f"moe_mlp_integers({_QUANTIZED_INPUTS}) -> Tensor", _integers, _quantized_fake)
define(f"moe_mlp_fp8({_QUANTIZED_INPUTS}) -> Tensor", _fp8, _quantized_fake)

BACKEND = Backend("triton", _supports, moe_mlp)
