"""AdamW over named parameters, with fp32 masters for weights of lower precision and a state that is plain tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["AdamW", "decays"]


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to norms and biases (one dimension), nor to embedding tables."""
    return parameter.ndim >= 2 and "embed" not in name


class AdamW:
    """AdamW (decoupled decay) for a model's trainable parameters.

    A parameter that is not fp32 (or fp64) gets an fp32 master copy: the update goes to the master and is rounded into the
    parameter, so that steps smaller than the parameter's precision are not lost.

    Args:
        model: the model; parameters are taken with their names.
        betas, eps, weight_decay: as in Loshchilov & Hutter, 2019.

    Precision: moments and update in fp32 (fp64 for fp64 weights). Determinism: bitwise; element by element.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._masters = {n: p.detach().float() if p.dtype in (torch.bfloat16, torch.float16) else p for n, p in self.parameters.items()}
        groups = [
            {"params": [m for n, m in self._masters.items() if decays(n, m) is decay], "weight_decay": weight_decay * decay}
            for decay in (True, False)
        ]
        self._inner = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)

    def step(self, learning_rate: float) -> None:
        """Update every parameter that has a gradient, and drop the gradients."""
        for group in self._inner.param_groups:
            group["lr"] = learning_rate
        for name, parameter in self.parameters.items():
            master = self._masters[name]
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        self._inner.step()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                master = self._masters[name]
                if master is not parameter:
                    parameter.copy_(master)
                    master.grad = None
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their joint norm is at most ``max_norm``; return the norm before.

        A norm that is not finite leaves the gradients unusable: the caller drops the step.
        """
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), max_norm, norm)
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """Everything but the weights, by ``kind/parameter name``: moments, step counts, masters."""
        state: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            for key, value in self._inner.state.get(master, {}).items():
                state[f"{key}/{name}"] = value
            if master is not self.parameters[name]:
                state[f"master/{name}"] = master.detach()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state written by :meth:`state_dict`.

        Raises:
            ValueError: tensors of unknown parameters, missing masters or wrong shapes, all named.
        """
        problems = []
        self._inner.state.clear()
        for key, value in state.items():
            kind, _, name = key.partition("/")
            master = self._masters.get(name)
            if master is None:
                problems.append(f"{key}: no such parameter")
            elif kind != "step" and value.shape != master.shape:
                problems.append(f"{key}: expected shape {tuple(master.shape)}, got {tuple(value.shape)}")
            elif kind == "master":
                master.data.copy_(value)
            else:
                self._inner.state[master][kind] = value.to(master.device).clone()  # the step too: fused AdamW reads it there
        for name, master in self._masters.items():
            if master is not self.parameters[name] and f"master/{name}" not in state:
                problems.append(f"master/{name}: missing")
        if problems:
            raise ValueError("optimizer state: " + "; ".join(problems))
