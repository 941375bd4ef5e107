"""Types of a dataclass's fields, checked before values are compared with anything."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

__all__ = ["check_field_types"]

# Of an annotation: the types that serve, that of the elements of a tuple, and its name in an error.
_KINDS: dict[str, tuple[tuple[type, ...], type, str]] = {
    "int": ((int,), object, "an int"),
    "float": ((int, float), object, "a number"),
    "bool": ((bool,), object, "True or False"),
    "str": ((str,), object, "a str"),
    "tuple[bool, ...]": ((tuple,), bool, "a tuple of True and False"),
    "dict[str, Any]": ((dict,), object, "a dict"),
    "EosIds": ((int, tuple), int, "an int, a tuple of ints"),
}


def check_field_types(instance: Any) -> None:
    """TypeError unless every field is of its annotation, which must be one of ``_KINDS``, or such ``| None``. True is no number."""
    for field in fields(instance):
        kind, _, optional = str(field.type).partition(" | ")
        allowed, element, expected = _KINDS[kind]
        value = getattr(instance, field.name)
        if optional and value is None:
            continue
        fits = _is(value, allowed)
        if isinstance(value, tuple):
            fits = fits and all(_is(v, (element,)) for v in value)
        if not fits:
            or_none = " or None" if optional else ""
            raise TypeError(f"{field.name}: expected {expected}{or_none}, got {type(value).__name__} {value!r:.80}")


def _is(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))
