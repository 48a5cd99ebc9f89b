"""What cannot be sent is refused by name, before gRPC or protobuf fail on it in their own way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from specpool.errors import InvalidArgument, Unauthenticated


@contextmanager
def valid_text() -> Iterator[None]:
    """A context to build a request in: text that is not Unicode (a lone surrogate) raises InvalidArgument."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"text must be valid Unicode; character {error.start} is {error.object[error.start]!a}",
            reason="INVALID_TEXT",
            metadata={"position": error.start, "accepted": "Unicode without lone surrogates"},
        ) from error


def checked_api_key(api_key: str) -> str:
    """The key, if it can be sent as metadata. Raises InvalidArgument."""
    if not api_key.isascii() or not api_key.isprintable() or api_key != api_key.strip():
        raise Unauthenticated("the API key must be printable ASCII without spaces or line ends around it")
    return api_key
