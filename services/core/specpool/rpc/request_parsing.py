"""Requests are parsed inside the interceptors, so that a malformed one is an error like any other.

gRPC would parse them before any interceptor runs: a malformed one would end UNKNOWN with a traceback in the log, and
anybody could send one, with or without credentials.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from types import MappingProxyType
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from specpool.errors import InvalidArgument
from specpool.rpc.errors import TOO_LARGE
from specpool.rpc.interceptors import Context, Handler, ScopeInterceptor, wrap

_STANDARD: Final = "/grpc."
_Metadata = Iterable[tuple[str, str | bytes]]


class Authentication(ScopeInterceptor):
    """Checks the credentials of a call before its request is parsed; health and reflection need none."""

    def __init__(self, check: Callable[[_Metadata], object]) -> None:
        self._check = check

    def scope(
        self, details: grpc.HandlerCallDetails, handler: Handler, context: Context
    ) -> AbstractAsyncContextManager[None]:
        """A context of one call, whose credentials are checked first. Raises Unauthenticated."""
        return self._checked(str(details.method), context)

    @asynccontextmanager
    async def _checked(self, method: str, context: Context) -> AsyncIterator[None]:
        if not method.startswith(_STANDARD):
            self._check(context.invocation_metadata() or ())
        yield


class Parsing(grpc.aio.ServerInterceptor):
    """Parses requests. It is the innermost interceptor: those around it see bytes."""

    def __init__(self, max_request_bytes: int, larger: Mapping[str, int] = MappingProxyType({})) -> None:
        self._max_request_bytes = max_request_bytes
        self._larger = larger

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Take the parsing out of gRPC's hands."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        parse = self._parser(handler.request_deserializer, str(handler_call_details.method))
        read = (lambda requests: _ParsedRequests(requests, parse)) if handler.request_streaming else parse
        return wrap(handler, lambda context: nullcontext(), read)

    def _parser(self, deserialize: Callable[[bytes], Any], method: str) -> Callable[[bytes], Any]:
        max_bytes = self._larger.get(method, self._max_request_bytes)

        def parse(encoded: bytes) -> Any:
            if len(encoded) > max_bytes:
                raise InvalidArgument(
                    f"the request has {len(encoded)} bytes; accepted: up to {max_bytes}",
                    reason=TOO_LARGE,
                    metadata={"num_bytes": len(encoded), "accepted": max_bytes},
                )
            try:
                return deserialize(encoded)
            except DecodeError as error:
                raise InvalidArgument(
                    f"the request of {method} is no valid message (text must be UTF-8)", reason="MALFORMED_REQUEST"
                ) from error

        return parse


class _ParsedRequests:
    """The parsed requests of a stream."""

    def __init__(self, encoded: AsyncIterator[bytes], parse: Callable[[bytes], Any]) -> None:
        self._encoded = encoded
        self._parse = parse

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        return self._parse(await anext(self._encoded))
