"""The routed experts of a MoE layer: gather, gate and up, SwiGLU, down, weighted sum."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import check_same, check_shape, check_tensor
from ..dispatch import run
from ..grouped_gemm import FLOATS, check_offsets
from ..moe_routing.routing import Routing
from ..quantized_experts import FP8_BLOCK, KINDS, STORAGE, QuantizedExperts
from . import native, reference, triton

__all__ = ["BACKENDS", "moe_mlp"]

BACKENDS = (native.BACKEND, triton.BACKEND, reference.BACKEND)


def moe_mlp(
    x: Tensor, routing: Routing, w_gate_up: Tensor | QuantizedExperts, w_down: Tensor | QuantizedExperts, *,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Sum over each token's chosen experts of weight * down(silu(gate(x)) * up(x)).

    Args:
        x: floating point [T, H].
        routing: the tokens' experts and weights, from :func:`moe_routing` or
            :meth:`Routing.from_topk`.
        w_gate_up: same dtype [E, 2I, H]. The I gate rows over the I up rows.
        w_down: same dtype [E, H, I]. Weights of experts without tokens are not read; their gradient
            is zero. Both weights may be :class:`QuantizedExperts` (each of its own kind), for
            inference only.
        backend: None chooses by the arguments; a name never falls back.

    Returns:
        Same dtype [T, H], differentiable with respect to x, routing.topk_weights, w_gate_up and
        w_down.

    Precision: rounds as the official code: gate, up, silu, their product and each expert's output
    in the dtype of x, every sum inside a matrix product and the weighted sum over k = 0 .. K-1 in
    fp32, the result once more in the dtype of x. int8 and int4 weights are rounded to the dtype of
    x and then treated as such weights; but native, at CPU levels avx512_bf16 and amx, multiplies up
    to 4 rows of bf16 with the integers themselves, nearer to the exact product (error 2^-16 of the
    largest of 32 or 64 columns of x; see docs/compatibility.md). With fp8 weights x and the product of silu and up are
    quantised too: every 128 columns of a row become e4m3 values by a scale, their largest
    magnitude / 448 in fp32; the products of e4m3 values are summed in fp32 and scaled by both
    scales (a GPU's tensor cores may keep fewer bits inside a sum of 128). In groups of 32, int8
    moves the result by 1.1 % and int4 by 15 %, fp8 by 6.4 % (Frobenius norm, normal weights).
    Determinism: bitwise, independent of the number of threads.

    Raises:
        TypeError: an argument is not a tensor, or routing is not a Routing.
        ValueError: a wrong shape, dtype or device, a routing that does not belong to these tokens
            and experts, or quantised weights where a gradient is wanted.
    """
    check_tensor("x", x, 2, FLOATS)
    _check_weight("w_gate_up", w_gate_up, x)
    _check_weight("w_down", w_down, x)
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a Routing, got {type(routing).__name__}")
    if isinstance(w_gate_up, QuantizedExperts) != isinstance(w_down, QuantizedExperts):
        raise ValueError("w_down: expected both weights or none quantised, got one of each")
    tokens, hidden = x.shape
    experts, width = w_gate_up.shape[0], w_gate_up.shape[1] // 2
    if experts < 1 or w_gate_up.shape[1] != 2 * width:
        raise ValueError(f"w_gate_up: expected shape (E, 2I, H) with E of at least 1, got {tuple(w_gate_up.shape)}")
    for name, weight, expected in (("w_gate_up", w_gate_up, (experts, 2 * width, hidden)), ("w_down", w_down, (experts, hidden, width))):
        if tuple(weight.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(weight.shape)}")
    check_tensor("routing.topk_ids", routing.topk_ids, 2, (torch.int32,))
    check_tensor("routing.topk_weights", routing.topk_weights, 2, (torch.float32, torch.float64))
    check_tensor("routing.offsets", routing.offsets, 1, (torch.int32,))
    check_tensor("routing.permutation", routing.permutation, 1, (torch.int32,))
    for name, part in zip(Routing._fields, routing, strict=True):
        check_same(f"routing.{name}", part, "x", x, dtype=False)
    top_k = routing.topk_ids.shape[1]
    if top_k < 1:
        raise ValueError(f"routing.topk_ids: expected at least one expert per token, got shape {tuple(routing.topk_ids.shape)}")
    check_shape("routing.topk_ids", routing.topk_ids, tokens, None)
    check_shape("routing.topk_weights", routing.topk_weights, tokens, top_k)
    check_shape("routing.offsets", routing.offsets, experts + 1)
    check_shape("routing.permutation", routing.permutation, tokens * top_k)
    check_offsets("routing.offsets", routing.offsets, tokens * top_k)
    if isinstance(w_gate_up, QuantizedExperts) and torch.is_grad_enabled():
        for name, t in (("x", x), ("routing.topk_weights", routing.topk_weights)):
            if t.requires_grad:
                raise ValueError(
                    f"{name}: expected no gradient to be wanted with quantised experts, which serve inference only: call under "
                    "torch.no_grad(), or train with unquantised weights (QuantizedExperts.dequantize)"
                )
    return run("moe_mlp", BACKENDS, backend, x, routing, w_gate_up, w_down)


def _check_weight(name: str, weight: Tensor | QuantizedExperts, x: Tensor) -> None:
    if not isinstance(weight, QuantizedExperts):
        check_tensor(name, weight, 3)
        check_same(name, weight, "x", x)
        return
    if weight.kind not in KINDS:
        raise ValueError(f"{name}.kind: expected one of {', '.join(KINDS)}, got {weight.kind!r}")
    check_tensor(f"{name}.data", weight.data, 3, STORAGE[weight.kind][:1])
    check_tensor(f"{name}.scales", weight.scales, 3, STORAGE[weight.kind][1:])
    check_same(f"{name}.data", weight.data, "x", x, dtype=False)
    check_same(f"{name}.scales", weight.scales, "x", x, dtype=False)
    if weight.kind == "fp8":
        experts, rows, columns = weight.data.shape
        if rows % FP8_BLOCK or columns % FP8_BLOCK:
            raise ValueError(f"{name}.data: expected multiples of {FP8_BLOCK} rows and columns for fp8, got shape {tuple(weight.shape)}")
        check_shape(f"{name}.scales", weight.scales, experts, rows // FP8_BLOCK, columns // FP8_BLOCK)
        return
    check_shape(f"{name}.scales", weight.scales, weight.data.shape[0], weight.data.shape[1], None)
    columns, groups = weight.shape[2], weight.scales.shape[2]
    if groups < 1 or columns % (32 * groups) or not columns:
        raise ValueError(f"{name}.scales: expected groups of a multiple of 32 that divides {columns} columns, got {groups} groups")
