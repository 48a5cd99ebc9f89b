"""Endpoints as routers tell them to targets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from specpool.addresses import parse_address
from specpool.discovery.discovery import Endpoint
from specpool.errors import ConfigError
from specpool.request_limits import invalid_value
from specpool.v1 import types_pb2

MAX_ENDPOINTS: Final = 4096
"""Most endpoints in one list."""
_MAX_CHARS: Final = 512
_MAX_LABELS: Final = 16


def to_messages(endpoints: Iterable[Endpoint]) -> list[types_pb2.SpeculatorEndpoint]:
    """Endpoints as messages for the wire, in a fixed order."""
    return [
        types_pb2.SpeculatorEndpoint(address=each.address, labels=each.labels, terminating=each.terminating)
        for each in sorted(endpoints, key=lambda endpoint: endpoint.address)
    ]


def from_messages(messages: Iterable[types_pb2.SpeculatorEndpoint]) -> list[Endpoint]:
    """Endpoints from messages of the wire. Raises InvalidArgument, which names what cannot be."""
    found = [_from_message(message) for message in messages]
    if len(found) > MAX_ENDPOINTS:
        raise invalid_value("speculators", f"{len(found)} entries", f"at most {MAX_ENDPOINTS}")
    return found


def _from_message(message: types_pb2.SpeculatorEndpoint) -> Endpoint:
    if len(message.address) > _MAX_CHARS:
        raise invalid_value("speculators.address", f"{len(message.address)} characters", f"at most {_MAX_CHARS}")
    try:
        parse_address(message.address)
    except ConfigError as error:
        raise invalid_value("speculators.address", message.address, "HOST:PORT or [IPV6]:PORT") from error
    labels = dict(message.labels)
    if len(labels) > _MAX_LABELS or any(len(text) > _MAX_CHARS for pair in labels.items() for text in pair):
        raise invalid_value(
            "speculators.labels", f"{len(labels)} labels", f"{_MAX_LABELS} of {_MAX_CHARS} characters each"
        )
    return Endpoint(message.address, labels=labels, terminating=message.terminating)
