"""Server interceptors: each runs every call inside an asynchronous scope.

Whatever shape a handler has (unary or streaming, coroutine or asynchronous generator), it is called inside the scope,
and a generator is closed before the scope is left: when a client cancels, the generator's ``finally`` runs at once, not
when the garbage collector comes by.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, Final, TypeAlias

import grpc
import grpc.aio

from specpool.errors import Internal, SpecPoolError
from specpool.rpc.errors import abort, from_rpc_error

_logger = logging.getLogger(__name__)
_WRITE_S: Final = 2.0

# Quoted: generic only in the type stubs.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Behavior = Callable[[Any, Context], Any]
Scope = Callable[[Context], AbstractAsyncContextManager[None]]


class ScopeInterceptor(grpc.aio.ServerInterceptor):
    """Base of interceptors that run calls inside `scope`."""

    def scope(self, details: grpc.HandlerCallDetails, handler: Handler, context: Context) -> Any:
        """The asynchronous context manager that one call runs in."""
        raise NotImplementedError

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler that was found; None (no such method) is passed on."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return wrap(handler, lambda context: self.scope(handler_call_details, handler, context))


class ErrorInterceptor(ScopeInterceptor):
    """The only place where errors become gRPC statuses.

    A `SpecPoolError` is sent as it is; a failed call to another service as the typed error behind it. Anything else is
    a defect: it is logged with its traceback under a random id, and the peer is told the id and nothing more.
    """

    def scope(
        self, details: grpc.HandlerCallDetails, handler: Handler, context: Context
    ) -> AbstractAsyncContextManager[None]:
        """A context in which errors leave as statuses."""
        return _errors_as_status(str(details.method), context)


@asynccontextmanager
async def _errors_as_status(method: str, context: Context) -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except Exception as error:
        is_ours = isinstance(error, SpecPoolError | grpc.aio.AioRpcError)
        if not is_ours and context.cancelled():  # writing to a call that is gone
            raise asyncio.CancelledError from error
        await abort(context, told_error(method, error))


def told_error(method: str, error: Exception) -> SpecPoolError:
    """What a peer is told of an error of ``method``. A defect is logged."""
    if isinstance(error, SpecPoolError):
        if isinstance(error, Internal):
            _logger.error("%s failed: %s", method, error, exc_info=error)
        return error
    if isinstance(error, grpc.aio.AioRpcError):
        return from_rpc_error(error)
    error_id = secrets.token_hex(4)
    _logger.error("%s failed unexpectedly (error id %s)", method, error_id, exc_info=error)
    return Internal(f"internal error {error_id}; see the log", metadata={"error_id": error_id})


def wrap(handler: Handler, scope: Scope, read: Callable[[Any], Any] | None = None) -> Handler:
    """The handler, run inside ``scope``.

    Args:
        handler: with a coroutine function or an asynchronous generator function.
        scope: entered before the handler is called.
        read: what the handler gets, made of what gRPC received (one message, or the iterator of a stream); the handler
            then gets bytes from gRPC. It runs inside ``scope``.
    """
    attribute = _attribute(handler)
    behavior = getattr(handler, attribute)
    if inspect.isasyncgenfunction(behavior):
        wrapped = _scoped_generator(behavior, scope, read or _as_it_is)
    elif inspect.iscoroutinefunction(behavior):
        wrapped = _scoped_coroutine(behavior, scope, read or _as_it_is)
    else:
        raise TypeError(f"handler {behavior!r} must be a coroutine function or an asynchronous generator function")
    make = getattr(grpc, f"{attribute}_rpc_method_handler")
    deserializer = handler.request_deserializer if read is None else None
    wrapped_handler: Handler = make(wrapped, deserializer, handler.response_serializer)
    return wrapped_handler


def _as_it_is(request: Any) -> Any:
    return request


def _attribute(handler: Handler) -> str:
    """Name of the attribute that holds the behaviour: unary_unary, unary_stream, stream_unary or stream_stream."""
    request = "stream" if handler.request_streaming else "unary"
    response = "stream" if handler.response_streaming else "unary"
    return f"{request}_{response}"


def _scoped_coroutine(behavior: Behavior, scope: Scope, read: Callable[[Any], Any]) -> Behavior:
    async def call(request: Any, context: Context) -> Any:
        async with scope(context):
            return await behavior(read(request), context)

    return call


def _scoped_generator(behavior: Behavior, scope: Scope, read: Callable[[Any], Any]) -> Behavior:
    async def call(request: Any, context: Context) -> None:
        async with scope(context), aclosing(behavior(read(request), context)) as responses:
            is_first = True
            async for response in responses:
                await (_write_whole(response, context) if is_first else context.write(response))
                is_first = False

    return call


async def _write_whole(response: Any, context: Context) -> None:
    """Write the first response, also when the call is being cancelled meanwhile.

    gRPC would forget that the headers were sent with it, and could then send no status.
    """
    writing = asyncio.ensure_future(context.write(response))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        writing.add_done_callback(lambda done: done.cancelled() or done.exception())  # the client may be gone
        await asyncio.wait({writing}, timeout=_WRITE_S)
        raise
