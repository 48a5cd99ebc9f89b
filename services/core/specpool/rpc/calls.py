"""The calls that a server runs: how many, and how all of them end with a reason when the server stops."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio

from specpool.errors import Draining, Overloaded
from specpool.rpc.interceptors import Context, Handler, ScopeInterceptor

_logger = logging.getLogger(__name__)
MAX_RUNNING_CALLS: Final = 20_000
_LOOK_S: Final = 0.01
_IDLE_LOOKS: Final = 3
_BUSY_LOOKS: Final = 25


@dataclass(eq=False, slots=True)
class _Call:
    method: str
    task: asyncio.Task[Any]
    told_to_end: bool = False


class RunningCalls(ScopeInterceptor):
    """Knows every call of a server. Stands inside the interceptor that turns errors into statuses."""

    def __init__(self, max_calls: int) -> None:
        self._max_calls = max_calls
        self._calls: set[_Call] = set()
        self._num_accepted = 0
        self._why_ended = ""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Count calls as they are taken, before their message is there."""
        self._num_accepted += 1
        return await super().intercept_service(continuation, handler_call_details)

    def scope(
        self, details: grpc.HandlerCallDetails, handler: Handler, context: Context
    ) -> AbstractAsyncContextManager[None]:
        """A context of one call, from its start to its end."""
        return self._running(str(details.method))

    @asynccontextmanager
    async def _running(self, method: str) -> AsyncIterator[None]:
        if self._why_ended:
            raise self._draining()
        if len(self._calls) >= self._max_calls:
            raise Overloaded(
                f"this server runs {self._max_calls} calls and takes no more; try again",
                metadata={"max_calls": self._max_calls, "retriable": "true"},
            )
        task = asyncio.current_task()
        assert task is not None
        call = _Call(method, task)
        self._calls.add(call)
        try:
            yield
        except asyncio.CancelledError:
            if not call.told_to_end:
                raise
            task.uncancel()
            raise self._draining() from None
        finally:
            self._calls.discard(call)

    def _draining(self) -> Draining:
        return Draining(self._why_ended, metadata={"retriable": "true"})

    async def wait_until_quiet(self, timeout_s: float) -> None:
        """Wait until the event loop has caught up with the calls that wait to be taken.

        They are taken one after another, each behind what running calls have to do: when none was for a while, none
        waits. A server that stops before that ends them with a bare CANCELLED.
        """
        deadline = time.monotonic() + timeout_s
        num_quiet = 0
        while num_quiet < (_BUSY_LOOKS if self._calls else _IDLE_LOOKS) and time.monotonic() < deadline:
            num_before = self._num_accepted
            await asyncio.sleep(_LOOK_S)
            num_quiet = num_quiet + 1 if self._num_accepted == num_before else 0

    def end(self, why: str) -> None:
        """End every call with `Draining`, also those that come later."""
        self._why_ended = self._why_ended or why
        for call in self._calls:
            if not call.told_to_end:
                call.told_to_end = True
                call.task.cancel()

    def abandon(self) -> None:
        """Cancel the handlers of calls that are over for gRPC and did not end when they were told to."""
        for call in self._calls:
            _logger.error("a call of %s did not end when it was told to; giving it up", call.method)
            call.told_to_end = False
            call.task.cancel()
