"""Checks of arguments. Every error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["check_block_size", "check_choice", "check_int", "check_kind", "check_number", "check_pair"]


def check_kind(name: str, value: Any, kind: type) -> None:
    """TypeError unless ``value`` is a ``kind``."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name}: expected {article} {kind.__name__}, got {_shown(value)}")


def check_int(name: str, value: Any, least: int | None = None) -> None:
    """TypeError unless ``value`` is an int (True is none), ValueError if it is below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {_shown(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_number(name: str, value: Any, most: float = math.inf) -> None:
    """TypeError unless ``value`` is a number, ValueError unless it is finite, at least 0 and at most ``most``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {_shown(value)}")
    if not 0 <= value < math.inf or value > most:
        expected = "a finite number of at least 0" if most == math.inf else f"a number in [0, {most:g}]"
        raise ValueError(f"{name}: expected {expected}, got {value}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_pair(name: str, value: Any) -> None:
    """TypeError unless ``value`` is a pair of numbers."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name}: expected two numbers, got {_shown(value)}")
    for part in value:
        if isinstance(part, bool) or not isinstance(part, int | float):
            raise TypeError(f"{name}: expected two numbers, got {_shown(value)}")


def check_block_size(name: str, value: Any) -> None:
    """ValueError unless ``value`` is "full" or an int of at least 1."""
    if value != "full" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f'{name}: expected a block size of at least 1 or "full", got {value!r}')


def _shown(value: Any) -> str:
    """The value itself if it is short, else its type."""
    simple = value is None or isinstance(value, bool | int | float | str | tuple)
    return repr(value) if simple and len(repr(value)) < 80 else type(value).__name__
