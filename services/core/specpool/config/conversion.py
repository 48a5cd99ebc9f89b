"""From what files, variables and flags hold to the types that settings are declared with."""

from __future__ import annotations

import enum
import math
import types
from pathlib import Path
from typing import Any, Final, Literal, Union, get_args, get_origin

_TRUE: Final = frozenset({"true", "yes", "on", "1"})
_FALSE: Final = frozenset({"false", "no", "off", "0"})
_NONE: Final = frozenset({"", "none", "null"})


def convert(value: object, kind: Any) -> Any:
    """``value`` as a ``kind``; ValueError if it is not one.

    Kinds: bool, int, float, str, Path, enumerations (by value or name), Literal, tuple[kind, ...] (a list, or text
    separated by commas), and ``kind | None`` (none, null or nothing). Nothing is guessed across kinds: 4.5 is no int, 1
    is no str.
    """
    if value is None and kind is types.NoneType:
        return None
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(kind))
    if origin is tuple:
        return _convert_tuple(value, get_args(kind)[0])
    if origin is Literal:
        return _convert_choice(value, {str(choice): choice for choice in get_args(kind)})
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _convert_enum(value, kind)
    if kind in _SCALARS:
        return _SCALARS[kind](value)
    raise TypeError(f"settings cannot have the type {kind}")


def accepted(kind: Any) -> str:
    """What `convert` accepts for ``kind``, in words."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(accepted(member) for member in get_args(kind))
    if origin is tuple:
        return f"a list, each entry {accepted(get_args(kind)[0])}"
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in kind)
    return _WORDS[kind]


def _convert_union(value: object, members: tuple[Any, ...]) -> Any:
    if types.NoneType in members and (value is None or (isinstance(value, str) and value.strip().lower() in _NONE)):
        return None
    for member in members:
        if member is types.NoneType:
            continue
        try:
            return convert(value, member)
        except ValueError:
            continue
    raise ValueError(value)


def _convert_tuple(value: object, member: Any) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")] if value.strip() else []
    if not isinstance(value, list | tuple):
        raise ValueError(value)
    return tuple(convert(entry, member) for entry in value)


def _convert_enum(value: object, kind: type[enum.Enum]) -> Any:
    if isinstance(value, kind):
        return value
    names = {member.name.lower(): member for member in kind}
    return _convert_choice(value, names | {str(member.value): member for member in kind})


def _convert_choice(value: object, choices: dict[str, Any]) -> Any:
    # YAML reads the bare words `off` and `on` as booleans.
    text = {False: "off", True: "on"}[value] if isinstance(value, bool) else str(value)
    for candidate in (text, text.lower()):
        if candidate in choices:
            return choices[candidate]
    raise ValueError(value)


def _to_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _TRUE | _FALSE:
        return value.strip().lower() in _TRUE
    raise ValueError(value)


def _to_int(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        return int(value)
    raise ValueError(value)


def _to_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _to_str(value: object) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(value)


def _to_path(value: object) -> Path:
    if isinstance(value, str | Path) and str(value):
        return Path(value).expanduser()
    raise ValueError(value)


_SCALARS: Final[dict[Any, Any]] = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str, Path: _to_path}
_WORDS: Final[dict[Any, str]] = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "text",
    Path: "a path",
    types.NoneType: "none",
}
