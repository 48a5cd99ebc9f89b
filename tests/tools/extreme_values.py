"""Extreme values of every number in a message, found by its descriptors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

UNSIGNED = (0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)
SIGNED = (0, 1, -1, 2**31 - 1, -(2**31))
FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, -0.0, 5e-324, 3e38, 1e39, 1e300, 1e6)
VALUES: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.CPPTYPE_UINT32: UNSIGNED,
    FieldDescriptor.CPPTYPE_UINT64: (*UNSIGNED, 2**63, 2**64 - 1),
    FieldDescriptor.CPPTYPE_INT32: SIGNED,
    FieldDescriptor.CPPTYPE_INT64: (*SIGNED, 2**63 - 1, -(2**63)),
    FieldDescriptor.CPPTYPE_FLOAT: FLOATS,
    FieldDescriptor.CPPTYPE_DOUBLE: FLOATS,
    FieldDescriptor.CPPTYPE_ENUM: (0, 1, 2, 3, 99, -1, 2**31 - 1),
    FieldDescriptor.CPPTYPE_BOOL: (False, True),
}


def numeric_fields(message: Message, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths to all numbers below a message, and a value to try for each."""
    for field in message.DESCRIPTOR.fields:
        here = (*path, field.name)
        if field.cpp_type in VALUES:
            yield from ((here, value) for value in VALUES[field.cpp_type])
        elif field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
            yield from ((here, pair) for pair in itertools.product(VALUES[key.cpp_type], VALUES[value.cpp_type]))
        elif field.message_type is not None:
            value = getattr(message, field.name)
            yield from numeric_fields(value.add() if field.is_repeated else value, here)


def put(message: Any, path: tuple[str, ...], value: Any) -> None:
    """Set the number at a path; a list gets it as its only element."""
    for name in path[:-1]:
        inner = getattr(message, name)
        message = inner if isinstance(inner, Message) else inner[0] if inner else inner.add()
    name = path[-1]
    field = message.DESCRIPTOR.fields_by_name[name]
    if isinstance(value, tuple):
        getattr(message, name)[value[0]] = value[1]
    elif field.is_repeated:
        del getattr(message, name)[:]
        getattr(message, name).append(value)
    else:
        setattr(message, name, value)
