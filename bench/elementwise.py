"""The frame of the benches of ops that do little arithmetic per element: rms_norm, rope, swiglu."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import as_exact_as, as_list
from .harness import Case, Settings, Variant, backends
from .shapes import rotate, stays_out

__all__ = ["elementwise"]


def elementwise(
    op: str,
    module: Any,
    name: str,
    inputs: Sequence[Tensor],
    call: Callable[..., Any],
    settings: Settings,
    *,
    shapes: dict[str, Any],
    bytes_moved: float,
    others: dict[str, Callable[..., Any]] | None = None,
    backward: bool = False,
) -> Iterator[Case]:
    """A case over copies of ``inputs`` that no cache holds (of small inputs there is one, as a model finds them: in a cache).

    Args:
        op: name of the op.
        module: its module, for the list of backends.
        name: of the case.
        inputs: of one call; the first one is the large one and, with ``backward``, gets a gradient, as do weights (1-D).
        call: ``call(*inputs, backend=name)``: a tensor or several.
        shapes, bytes_moved: see :class:`Case`.
        others: further baselines, ``f(*inputs)``.
        backward: forward and gradients rather than forward.
    """
    dtype = inputs[0].dtype
    if not settings.wants(name, dtype):
        return
    size = inputs[0].numel() * inputs[0].element_size()
    copies = rotate(lambda: [inputs[0].clone(), *inputs[1:]], size, settings.quick)
    wanted = [i for i, x in enumerate(inputs) if i == 0 or x.ndim == 1]

    def run(f: Callable[..., Any], values: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if not backward:
            with torch.no_grad():
                return tuple(as_list(f(*values)))
        leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(values)]
        out = as_list(f(*leaves))
        grads = [g.to(o.dtype) for g, o in zip(grads, out, strict=True)]
        return *(o.detach() for o in out), *torch.autograd.grad(out, [leaves[i] for i in wanted], grads)

    exact_inputs = [x.double() for x in inputs]
    generator = torch.Generator().manual_seed(9)
    grads = [torch.randn(o.shape, generator=generator).to(dtype) for o in as_list(call(*inputs, backend="reference"))]
    check = as_exact_as(
        run(lambda *a: call(*a, backend="reference"), exact_inputs, grads), run(lambda *a: call(*a, backend="reference"), inputs, grads)
    )
    variants = backends(module, lambda backend: run(lambda *a: call(*a, backend=backend), next(copies), grads))
    for other, f in (others or {}).items():
        variants.append(Variant(other, lambda f=f: run(f, next(copies), grads)))  # type: ignore[misc]
    yield Case(op, name, dtype, shapes, variants, check, None, bytes_moved if stays_out(size) else None)
