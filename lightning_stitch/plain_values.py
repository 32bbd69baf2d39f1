"""Frozen dataclasses to plain JSON values and back, every field's type checked: what comes back may be a stranger's."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

_Part = TypeVar("_Part")


@cache
def _type_hints(cls: Hashable) -> dict[str, Any]:
    return get_type_hints(cls)


def plain(value: Any) -> Any:
    """Tuples to lists, all the way down, so that JSON and a checkpoint give back what was put in."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def built(cls: type[_Part], fields: dict[str, Any]) -> _Part:
    """The inverse for a dataclass and those in it, their fields' types checked: a recipe may come from a stranger.

    Raises:
        TypeError: If a field is missing, unknown or ill-typed.
    """
    if not isinstance(fields, dict):
        raise TypeError(f"{cls.__name__} is {fields!r}; expected a dict")
    hints = _type_hints(cast(Hashable, cls))
    values = {}
    for name, value in fields.items():
        try:
            values[name] = _converted(value, hints.get(name, Any))
        except _IllTyped:
            hint = hints[name]
            expected = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
            raise TypeError(f"{cls.__name__}.{name} is {value!r}; expected {expected.replace('typing.', '')}") from None
    return cls(**values)


def has_type(value: Any, hint: Any) -> bool:
    """Whether a plain value is one of a type hint's, lists standing for tuples."""
    try:
        _converted(value, hint)
    except (_IllTyped, TypeError):
        return False
    return True


class _IllTyped(Exception):
    """A value is not of the type that its field has."""


def _converted(value: Any, hint: Any) -> Any:
    """A value of a field's type: lists become tuples and dicts dataclasses, as deep as the type goes."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and type(None) in parts:
            return None
        return _converted(value, next(part for part in parts if part is not type(None)))
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return built(cast(type, hint), value)
    if origin is tuple and isinstance(value, list | tuple):
        parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(parts) == len(value):
            return tuple(map(_converted, value, parts))
    if origin is dict and isinstance(value, dict):
        return {key: _converted(item, parts[1]) for key, item in value.items()}
    if hint is Any or (origin is Literal and value in parts):
        return value
    classes = (int, float) if hint is float else hint
    if origin is None and isinstance(value, classes) and isinstance(value, bool) == (hint is bool):
        return value
    raise _IllTyped
