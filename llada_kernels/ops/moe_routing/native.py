"""moe_routing in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _library
from .._common import native_reason, register_autograd
from ..dispatch import Backend
from .routing import Routing
from .rule import Rule, derivative, gradient, results, setup_context


def _supports(logits: Tensor, expert_bias: Tensor | None, rule: Rule) -> str | None:
    if logits.is_cuda and logits.shape[1] + rule.n_group > 1500:
        return f"native serves at most 1500 experts and groups together on a GPU, got {logits.shape[1] + rule.n_group}"
    return native_reason(logits, expert_bias, dtypes=(torch.float32,), cuda="moe_routing")


def _moe_routing(logits: Tensor, expert_bias: Tensor | None, rule: Rule) -> Routing:
    bias = None if expert_bias is None else expert_bias.detach().float().contiguous()
    weights, ids, *order = torch.ops.llada_kernels.moe_routing(logits.contiguous(), bias, *rule.numbers())
    return Routing(ids, weights, *order)


if _library.load_error is None:
    torch.library.register_fake("llada_kernels::moe_routing", results)
    torch.library.register_fake("llada_kernels::moe_routing_backward", gradient)

    def _backward(ctx: Any, grad_weights: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return derivative(torch.ops.llada_kernels.moe_routing_backward, ctx, grad_weights.contiguous())

    register_autograd("llada_kernels::moe_routing", _backward, setup_context)


BACKEND = Backend("native", _supports, _moe_routing)
