"""Spans for gRPC calls, both sides, and the W3C trace context in their metadata.

Attribute names are those of the `rpc.*` semantic conventions. Health and reflection calls get no span, nor do streams
in both directions: those serve many requests, so each request's context travels in its own message.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
import grpc.aio
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, StatusCode

from specpool.rpc.interceptors import Context, Handler, ScopeInterceptor
from specpool.telemetry.tracing import extract, inject, tracer

RPC_SYSTEM_NAME: Final = "rpc.system.name"
RPC_METHOD: Final = "rpc.method"
RPC_RESPONSE_STATUS_CODE: Final = "rpc.response.status_code"
_UNTRACED: Final = ("/grpc.health.", "/grpc.reflection.")
# Statuses that are the server's fault; others (bad argument, not found) are ordinary answers.
_SERVER_FAULTS: Final = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)


class ServerTracing(ScopeInterceptor):
    """Makes one server span per call, child of the caller's."""

    def scope(self, details: grpc.HandlerCallDetails, handler: Handler, context: Context) -> Any:
        """A context in which the call's span is current."""
        both_ways = handler.request_streaming and handler.response_streaming
        return _server_span(str(details.method), context, traced=not both_ways and _is_traced(str(details.method)))


@asynccontextmanager
async def _server_span(method: str, context: Context, *, traced: bool) -> AsyncIterator[None]:
    if not traced:
        yield
        return
    parent = extract(context.invocation_metadata() or ())
    with tracer().start_as_current_span(
        method.lstrip("/"),
        parent,
        SpanKind.SERVER,
        _attributes(method),
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        code = "OK"
        try:
            yield
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except BaseException:
            code = _code_name(context)
            raise
        finally:
            _set_code(span, code, failed=code in _SERVER_FAULTS)


def _code_name(context: Context) -> str:
    """Name of the status that a call was aborted with."""
    code: Any = context.code()
    if isinstance(code, grpc.StatusCode):
        return code.name
    return next((status.name for status in grpc.StatusCode if status.value[0] == code), "UNKNOWN")


class ClientTracing(grpc.aio.UnaryUnaryClientInterceptor):
    """Makes one client span per unary call."""

    async def intercept_unary_unary(
        self,
        continuation: Callable[..., Awaitable[Any]],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        """Start the span, hand its context on."""
        return await _traced_call(continuation, client_call_details, request)


class ClientStreamTracing(grpc.aio.UnaryStreamClientInterceptor):
    """Makes one client span per call that streams its responses, open until the stream ends."""

    async def intercept_unary_stream(
        self,
        continuation: Callable[..., Awaitable[Any]],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        """Start the span, hand its context on."""
        return await _traced_call(continuation, client_call_details, request)


async def _traced_call(
    continuation: Callable[..., Awaitable[Any]], details: grpc.aio.ClientCallDetails, request: Any
) -> Any:
    raw_method: Any = details.method
    method = raw_method.decode() if isinstance(raw_method, bytes) else str(raw_method)
    if not _is_traced(method):
        return await continuation(details, request)
    span = tracer().start_span(method.lstrip("/"), kind=SpanKind.CLIENT, attributes=_attributes(method))
    try:
        call = await continuation(_with_trace_context(details, span), request)
    except BaseException:
        _set_code(span, "CANCELLED", failed=False)
        span.end()
        raise
    if span.is_recording():
        ending = asyncio.ensure_future(_end_with(call, span))
        call.add_done_callback(lambda _: ending)  # keeps the task alive as long as the call
    return call


async def _end_with(call: Any, span: Span) -> None:
    try:
        code = (await call.code()).name
    except asyncio.CancelledError:
        code = "CANCELLED"
    _set_code(span, code, failed=code not in ("OK", "CANCELLED"))
    span.end()


def _with_trace_context(details: grpc.aio.ClientCallDetails, span: Span) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    for key, value in inject(trace.set_span_in_context(span)).items():
        metadata.add(key, value)
    return grpc.aio.ClientCallDetails(
        details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
    )


def _set_code(span: Span, code: str, *, failed: bool) -> None:
    span.set_attribute(RPC_RESPONSE_STATUS_CODE, code)
    if failed:
        span.set_attribute("error.type", code)
        span.set_status(StatusCode.ERROR, code)


def _attributes(method: str) -> dict[str, str]:
    return {RPC_SYSTEM_NAME: "grpc", RPC_METHOD: method.lstrip("/")}


def _is_traced(method: str) -> bool:
    return not method.startswith(_UNTRACED)
