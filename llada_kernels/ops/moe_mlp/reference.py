"""moe_mlp in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from .._common import compute_dtype
from ..dispatch import Backend
from ..grouped_gemm.reference import grouped_gemm
from ..moe_routing.routing import Routing
from ..quantized_experts import QuantizedExperts, fp8_values


def _product(a: Tensor, weight: Tensor | QuantizedExperts, offsets: Tensor) -> Tensor:
    """grouped_gemm; of quantised experts one is dequantised at a time, where the experts in use can be known."""
    if not isinstance(weight, QuantizedExperts):
        return grouped_gemm(a, weight, offsets)
    dtype = a.dtype
    if weight.kind == "fp8":
        a = fp8_values(a).to(compute_dtype(a))
    if torch.compiler.is_compiling():
        return grouped_gemm(a, weight.dequantize(a.dtype), offsets).to(dtype)
    parts = a.split(offsets.diff().tolist())
    products = [rows @ weight.expert(e).dequantize(a.dtype)[0].mT for e, rows in enumerate(parts) if e == 0 or len(rows)]
    return torch.cat(products).to(dtype)


def moe_mlp(x: Tensor, routing: Routing, w_gate_up: Tensor | QuantizedExperts, w_down: Tensor | QuantizedExperts) -> Tensor:
    """See :func:`llada_kernels.ops.moe_mlp`."""
    tokens, top_k = routing.topk_ids.shape
    slots = routing.permutation.long()
    if slots.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.equal(slots.sort().values, torch.arange(len(slots))):
        raise ValueError(f"permutation: expected each of 0 to {len(slots) - 1} once, got {routing.permutation.tolist()[:8]}...")
    gate, up = _product(x[slots // top_k], w_gate_up, routing.offsets).chunk(2, -1)
    rows = _product(silu(gate) * up, w_down, routing.offsets)
    place = torch.empty_like(slots).scatter_(0, slots, torch.arange(slots.shape[0], device=slots.device))
    choices = rows[place].view(tokens, top_k, x.shape[1]).to(compute_dtype(x)).unbind(1)
    weights = routing.topk_weights.to(compute_dtype(x)).unsqueeze(-1).unbind(1)
    out = choices[0] * weights[0]
    for k in range(1, top_k):
        out = out + choices[k] * weights[k]
    return out.to(x.dtype)


BACKEND = Backend("reference", lambda *args: None, moe_mlp)
