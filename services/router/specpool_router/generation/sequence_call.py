"""One sequence of a shared stream, as the call that it stands for: read, cancelled, ended by an error or by the stream.

Between its client and the stream lies a queue. When the client is slow the target is told to hold the sequence, and
keeps what comes of it, as it does where each sequence has a stream of its own; the others go on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import grpc
import grpc.aio

from specpool.v1 import target_pb2

Event = target_pb2.RunSequenceResponse
Command = target_pb2.RunSequencesRequest
_HOLD_AT: Final = 64
"""Events in the queue at which the target is told to hold the sequence."""
_GO_ON_AT: Final = 16
_MAX_EVENTS: Final = 10_000
"""Events in the queue at which the target does not hold what it was told to hold."""


class SequenceCall:
    """Has `read` and `cancel` of a gRPC call that streams its responses. Used on the event loop."""

    __slots__ = (
        "_ending",
        "_events",
        "_instead",
        "_is_held",
        "_is_sent",
        "_notify",
        "_request",
        "_told_of_cancel",
        "_told_of_hold",
        "_traceparent",
        "_waiter",
        "id",
    )

    def __init__(
        self,
        sequence_id: int,
        request: target_pb2.RunSequenceRequest,
        traceparent: str,
        notify: Callable[[SequenceCall], None],
    ) -> None:
        """``notify`` is called when the target is to be told something; `command` then says what."""
        self.id = sequence_id
        self._request: target_pb2.RunSequenceRequest | None = request
        self._traceparent = traceparent
        self._notify = notify
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ending: BaseException | None = None
        """What `read` raises after the last event; None while more may come."""
        self._instead: Any = None
        """A call of its own, where the target turned out to have no shared streams."""
        self._is_sent = False
        self._is_held = False
        self._told_of_hold = False
        self._told_of_cancel = True

    # ---- the reader's side ------------------------------------------------------------------------------------

    async def read(self) -> Any:
        """The next event. Raises AioRpcError, or CancelledError where the call was cancelled or its channel closed."""
        while not self._events:
            if self._instead is not None:
                return await self._instead.read()
            if self._ending is not None:
                raise _again(self._ending)
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        event = self._events.popleft()
        if self._is_held and len(self._events) <= _GO_ON_AT:
            self._is_held = False
            self._notify(self)
        return event

    def cancel(self) -> None:
        """End it: the target is told, and `read` raises CancelledError. Does nothing after its end."""
        if self._instead is not None:
            self._instead.cancel()
        elif self._ending is None:
            self._told_of_cancel = False
            self.end(asyncio.CancelledError())
            self._events.clear()
            self._notify(self)

    # ---- the stream's side ------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether nothing of the stream is for it any more."""
        return self._ending is not None or self._instead is not None

    def command(self) -> Command | None:
        """What the target is to be told of it next."""
        if not self._is_sent:
            if self.is_over or self._request is None:
                return None
            self._is_sent = True
            start = target_pb2.StartSequence(id=self.id, request=self._request, traceparent=self._traceparent)
            return Command(start=start)
        if self._ending is not None:
            is_told, self._told_of_cancel = self._told_of_cancel, True
            return None if is_told else Command(cancel=self.id)
        if self._told_of_hold != self._is_held:
            self._told_of_hold = self._is_held
            return Command(hold=self.id) if self._is_held else Command(go_on=self.id)
        return None

    def put(self, event: Event) -> None:
        """Take in the next event of the stream."""
        self._request = None
        if self._waiter is None or self._events:
            # It may lie here for long: as part of its message it would keep all of that in memory.
            own = Event()
            own.CopyFrom(event)
            event = own
        self._events.append(event)
        if event.HasField("finished"):
            self.end(_early_end())  # nobody reads on after it
        elif len(self._events) >= _HOLD_AT:
            self._hold()
        self._wake()

    def end(self, ending: BaseException) -> None:
        """Have `read` raise ``ending`` after the events that it has."""
        if self._ending is None:
            self._ending = ending
            self._wake()

    def replace(self, call: Callable[[target_pb2.RunSequenceRequest], Any]) -> None:
        """Run it as a call of its own, made with its request: the target has no shared streams."""
        if not self.is_over and self._request is not None:
            self._instead = call(self._request)
            self._request = None
            self._wake()

    def _hold(self) -> None:
        if not self._is_held:
            self._is_held = True
            self._notify(self)
        elif len(self._events) >= _MAX_EVENTS:
            self._told_of_cancel = False
            self.end(broken("the target does not hold a sequence that it was told to hold"))
            self._notify(self)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def broken(why: str) -> grpc.aio.AioRpcError:
    """What gRPC raises of a call that broke."""
    return grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), why)


def _again(error: BaseException) -> BaseException:
    """The same error for one more reader: each has its own traceback."""
    if isinstance(error, grpc.aio.AioRpcError):
        return grpc.aio.AioRpcError(
            error.code(),
            error.initial_metadata(),
            error.trailing_metadata(),
            error.details(),
            error.debug_error_string(),
        )
    return asyncio.CancelledError()


def _early_end() -> grpc.aio.AioRpcError:
    return broken("nothing follows the end of a sequence")
