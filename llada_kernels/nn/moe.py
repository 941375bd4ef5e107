"""MLPs of the family: gated, and as a mixture of experts with its router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from ..ops._common import compute_dtype
from ..ops.moe_mlp import moe_mlp
from ..ops.moe_routing import Routing, moe_routing
from ..ops.quantized_experts import QuantizedExperts
from ..ops.swiglu import swiglu

__all__ = ["GatedMLP", "MoE", "QuantizedWeight", "Router", "RouterOutput"]


class RouterOutput(NamedTuple):
    """What one router decided.

    Attributes:
        logits: fp32 [T, E], differentiable.
        routing: the choice that was made of them.
    """

    logits: Tensor
    routing: Routing


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); the rows of ``gate_up`` are the gate's, then those of up."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, False, device, dtype)
        self.down = nn.Linear(width, hidden, False, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden], dtype of the weights -> the same. Products are rounded in that dtype."""
        return self.down(swiglu(self.gate_up(x)))


class Router(nn.Module):
    """Chooses the experts of each token.

    ``expert_bias`` is a buffer: it takes part in the choice only, gets no gradient, and stays in fp32 whatever dtype the model is
    moved to.
    """

    expert_bias: Tensor | None

    def __init__(self, config: Config, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, dtype=dtype, device=device))
        bias = torch.zeros(config.num_experts, dtype=torch.float32, device=device) if config.expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x: Tensor) -> RouterOutput:
        """Route.

        Args:
            x: [T, hidden_size].

        Precision: LLaDA2: logits in fp32 from inputs upcast to fp32, whatever the dtype of the model (it decides which experts
            are chosen). LLaDA-MoE: logits and weights in the dtype of x, the softmax in fp32, as its official code.
        Determinism: bitwise repeatable; ties go to the lowest expert.
        """
        c = self.config
        exact = compute_dtype(x)
        if c.router_dtype == "fp32":
            logits = F.linear(x.to(exact), self.weight.to(exact))
        else:
            logits = F.linear(x, self.weight.to(x.dtype)).to(exact)
        routing = moe_routing(
            logits, self.expert_bias, c.num_experts_per_tok, c.n_group, c.topk_group, c.routed_scaling_factor, c.score_function,
            c.norm_topk_prob,
        )  # fmt: skip
        if c.router_dtype == "model":
            routing = routing._replace(topk_weights=routing.topk_weights.to(x.dtype).to(exact))
        return RouterOutput(logits, routing)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        before = self.expert_bias
        super()._apply(fn, recurse)
        after = self.expert_bias
        if before is not None and after is not None and after.dtype != before.dtype:
            self.expert_bias = before.to(after.device)  # from the values before the cast: nothing was rounded
        return self


class QuantizedWeight(nn.Module):
    """Holds a :class:`QuantizedExperts` in two buffers, in the place and under the name of the parameter that it stands for.

    They are the weight, not a cache of it, so they are part of ``state_dict`` (as ``<name>.data`` and ``<name>.scales``). Moving the
    model to another dtype leaves them as they are.
    """

    data: Tensor
    scales: Tensor

    def __init__(self, value: QuantizedExperts) -> None:
        super().__init__()
        self.kind = value.kind
        self.register_buffer("data", value.data)
        self.register_buffer("scales", value.scales)

    @property
    def value(self) -> QuantizedExperts:
        """What :func:`moe_mlp` takes."""
        return QuantizedExperts(self.kind, self.data, self.scales)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.value.shape}, group_size={self.value.group_size}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, values in before.items():
            after = getattr(self, name)
            if after.dtype != values.dtype:
                setattr(self, name, values.to(after.device))
        return self


class MoE(nn.Module):
    """A router, its experts, and the shared expert that serves every token.

    ``w_gate_up`` [E, 2I, H] stacks each expert's gate rows over its up rows; ``w_down`` is [E, H, I]. Both are parameters, or after
    :meth:`quantize` :class:`QuantizedWeight` modules.
    """

    w_gate_up: nn.Parameter | QuantizedWeight
    w_down: nn.Parameter | QuantizedWeight

    def __init__(self, config: Config, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.router = Router(config, dtype, device)
        self.w_gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden, dtype=dtype, device=device))
        self.w_down = nn.Parameter(torch.empty(experts, hidden, width, dtype=dtype, device=device))
        shared = config.shared_expert_intermediate_size
        self.shared_expert = GatedMLP(hidden, shared, dtype, device) if shared else None

    @property
    def expert_kind(self) -> str | None:
        """Kind of the quantised experts, or None."""
        return self.w_gate_up.kind if isinstance(self.w_gate_up, QuantizedWeight) else None

    def quantize(self, kind: str, group_size: int | None = None) -> None:
        """Put quantised experts in the place of the parameters; see :meth:`QuantizedExperts.quantize`. On the meta device they are empty.

        Raises:
            ValueError: an unknown kind, a group size that does not divide the hidden size and the expert width, or experts that are
                quantised already.
        """
        if self.expert_kind is not None:
            raise ValueError(f"kind: expected experts that are not quantised yet, got {self.expert_kind} ones")
        make = QuantizedExperts.quantize if self.w_gate_up.device.type != "meta" else _empty_like
        for name in ("w_gate_up", "w_down"):
            value = make(getattr(self, name), kind, group_size)
            delattr(self, name)  # at once: only one weight is ever there in both forms
            setattr(self, name, QuantizedWeight(value))

    def forward(self, x: Tensor, record: Callable[[RouterOutput], Any] | None = None) -> Tensor:
        """Serve each token by its experts.

        Args:
            x: [T, hidden_size], dtype of the weights.
            record: called with the router's output.

        Returns:
            [T, hidden_size], dtype of x.

        Precision: each expert's output is rounded to the dtype of x, weighted and summed in fp32, rounded once, then the shared
            expert is added in the dtype of x.
        Determinism: bitwise repeatable.
        """
        routed = self.router(x)
        if record is not None:
            record(routed)
        y = moe_mlp(x, routed.routing, _weight(self.w_gate_up), _weight(self.w_down))
        return y if self.shared_expert is None else y + self.shared_expert(x)


def _weight(held: nn.Parameter | QuantizedWeight) -> Tensor | QuantizedExperts:
    return held.value if isinstance(held, QuantizedWeight) else held


def _empty_like(weight: Tensor, kind: str, group_size: int | None) -> QuantizedExperts:
    return QuantizedExperts.empty(tuple(weight.shape), kind, group_size, weight.device)
