from __future__ import annotations

from typing import Any


class _Anything:
    """A strategy, or what makes one."""

    def __getattr__(self, name: str) -> _Anything:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Anything:
        return self


def __getattr__(name: str) -> _Anything:
    if name.startswith("__"):  # those of a module
        raise AttributeError(name)
    return _Anything()
