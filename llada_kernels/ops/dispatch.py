"""Choosing a backend: each op lists its backends in order of preference and the first that supports the call serves it.

A decision depends only on the arguments (dtype, shape, device, kind of mask) and on :func:`use_backend`, so
``torch.compile`` can trace it and nothing is decided by side effects of an import.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Backend", "explain", "run", "use_backend"]


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: ``"native"``, ``"triton"`` or ``"reference"``.
        supports: takes the op's positional arguments; returns None, or the reason why it cannot serve them. Cheap, no syncs.
        fn: the implementation, same arguments.
    """

    name: str
    supports: Callable[..., str | None]
    fn: Callable[..., Any]


NAMES = ("native", "triton", "reference")

# A plain module global, not a ContextVar: Dynamo guards on it, so compiled code notices a change.
_forced: str | None = None


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force every op called inside the block to use the backend ``name`` (None: the default choice again).

    As with ``backend=name`` nothing falls back: an op that this backend cannot serve raises ValueError with the reason.
    An explicit ``backend=`` argument wins. Holds for the process, not for one thread.

    Raises:
        ValueError: ``name`` is not a backend's name.
    """
    global _forced
    if name is not None and name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def run(op: str, backends: tuple[Backend, ...], backend: str | None, *args: Any) -> Any:
    """Call ``op`` with the named backend, or with the first of ``backends`` that supports ``args``.

    Raises:
        ValueError: the named backend does not exist or does not support the call, or none does; the text gives the reason of each.
    """
    name = backend if backend is not None else _forced
    if name is None:
        for candidate in backends:
            if candidate.supports(*args) is None:
                return candidate.fn(*args)
        reasons = "; ".join(f"{b.name}: {b.supports(*args)}" for b in backends)
        raise ValueError(f"{op}: no backend supports this call ({reasons})")
    if name is _QUESTION:
        raise _Asked(*args)
    for candidate in backends:
        if candidate.name == name:
            reason = candidate.supports(*args)
            if reason is not None:
                raise ValueError(f"{op}: backend {name!r} does not support this call: {reason}")
            return candidate.fn(*args)
    raise ValueError(f"{op}: backend: expected one of {', '.join(b.name for b in backends)}, got {name!r}")


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """A table to print: each backend of ``op``, and for this call whether it is chosen, possible, or why not.

    Args:
        op: an op's name (``"block_attention"``) or the op itself.
        *args, **kwargs: what the op would be called with; without any, only the list of backends is shown.

    Raises:
        ValueError: there is no op of that name.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    try:
        module = importlib.import_module(f"llada_kernels.ops.{name}")
        backends: tuple[Backend, ...] = module.BACKENDS
    except (ImportError, AttributeError):
        raise ValueError(f"op: expected the name of an op of llada_kernels.ops, got {name!r}") from None
    rows = [(b.name, "listed") for b in backends]
    if args or kwargs:
        rows, chosen = [], False
        asked = kwargs.pop("backend", None) or _forced
        call = _normalised_arguments(getattr(module, name), args, kwargs)
        for b in backends:
            reason = b.supports(*call)
            if reason is None:
                wanted = asked in (None, b.name) and not chosen
                chosen, reason = chosen or wanted, "chosen" if wanted else "possible"
            rows.append((b.name, reason))
    return "\n".join([f"{name}:"] + [f"  {n:<10} {r}" for n, r in rows])


class _Asked(Exception):
    """Carries an op's checked positional arguments out of :func:`run`."""


# Takes the place of a backend's name where `explain` asks an op how it would call its backends: no state that other threads could see.
_QUESTION: Any = object()


def _normalised_arguments(op: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, ...]:
    """The arguments with which ``op`` would call its backends: the op itself checks and completes them."""
    try:
        op(*args, **kwargs, backend=_QUESTION)
    except _Asked as asked:
        return tuple(asked.args)
    raise AssertionError("an op must end in dispatch.run")
