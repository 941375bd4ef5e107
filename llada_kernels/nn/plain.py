"""When the weights of a module may be used without calling it."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

from torch import nn
from torch.nn.modules import module as global_hooks

__all__ = ["is_plain"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def is_plain(module: nn.Module | None, kind: type[ModuleT]) -> TypeGuard[ModuleT]:
    """Whether calling ``module`` does what ``kind`` does and nothing else, so that a fused kernel may take its weights instead.

    Not a subclass (a parametrized module is one), a wrapper such as an adapter, a quantised stand-in, a module with hooks or with a
    ``forward`` of its own: those are called.
    """
    if type(module) is not kind:
        return False
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    everywhere = global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks or global_hooks._global_backward_hooks
    return not (hooks or everywhere or global_hooks._global_backward_pre_hooks or "forward" in module.__dict__)
