"""The streams between this router and its targets: one to each, for all sequences that run there.

A message brings what there is for all of them, so that a token costs the router neither a read of its own nor a system
call. What breaks a stream ends all its sequences as if each had lost its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

import grpc
import grpc.aio

from specpool.errors import Draining
from specpool.rpc.errors import from_rpc_error, rpc_error_of
from specpool.telemetry import tracing
from specpool.v1 import target_pb2, target_pb2_grpc
from specpool_router.generation.sequence_call import SequenceCall, broken
from specpool_router.placement.pods import Pod

_logger = logging.getLogger(__name__)
Target = Pod[target_pb2.GetTargetStatusResponse]
_LARGEST_BYTES: Final = 256 << 10
"""Larger requests get a call of their own, so that the others' commands need not wait for them."""


class Call(Protocol):
    """What a run of a request at a target needs of its call."""

    async def read(self) -> Any:
        """The next event; EOF, AioRpcError or CancelledError at the end."""
        ...

    def cancel(self) -> object:
        """End it."""
        ...


class SharedStreams:
    """Opens a stream to a target when it is needed first, and knows which targets have none."""

    def __init__(self) -> None:
        self._streams: dict[grpc.aio.Channel, _SharedStream] = {}
        self._without: WeakKeyDictionary[grpc.aio.Channel, int] = WeakKeyDictionary()
        """Targets of a version before shared streams: the incarnation that was asked."""

    def call(self, target: Target, request: target_pb2.RunSequenceRequest) -> Call:
        """Run a request at a target, over the shared stream if that goes."""
        stub: Any = target_pb2_grpc.TargetServiceStub(target.channel)
        if self._without.get(target.channel) == _incarnation(target) or request.ByteSize() > _LARGEST_BYTES:
            call: Call = stub.RunSequence(request)
            return call
        stream = self._streams.get(target.channel)
        if stream is None:
            stream = self._streams[target.channel] = _SharedStream(target, stub, self._leave)
        return stream.start(request)

    def _leave(self, stream: _SharedStream, *, is_unknown: bool = False) -> None:
        """Use a stream for nothing new; ``is_unknown``: nor any other one to this target."""
        channel = stream.target.channel
        if self._streams.get(channel) is stream:
            del self._streams[channel]
        if is_unknown:
            self._without[channel] = _incarnation(stream.target)
            _logger.info("%s has no shared streams: each sequence gets its own", stream.target.endpoint.address)


class _SharedStream:
    """One stream."""

    def __init__(self, target: Target, stub: Any, leave: Callable[..., None]) -> None:
        self.target = target
        self._stub = stub
        self._leave = leave
        self._call = stub.RunSequences()
        self._calls: dict[int, SequenceCall] = {}
        self._last_id = 0
        self._is_left = False
        self._has_answered = False
        self._to_tell: dict[SequenceCall, None] = {}
        """Sequences of which the target is to be told something: at most once each, however slowly it reads."""
        self._wake = asyncio.Event()
        context = contextvars.Context()  # not that of the request that happens to be the first
        self._writing = asyncio.create_task(self._write(), context=context)
        self._reading = asyncio.create_task(self._read(), context=context)

    def start(self, request: target_pb2.RunSequenceRequest) -> SequenceCall:
        """Run a request."""
        self._last_id += 1
        call = SequenceCall(self._last_id, request, tracing.traceparent(), self._tell)
        self._calls[call.id] = call
        self._tell(call)
        return call

    def _tell(self, call: SequenceCall) -> None:
        self._to_tell[call] = None
        self._wake.set()

    async def _write(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._to_tell:
                    call = next(iter(self._to_tell))
                    command = call.command()
                    if command is None:
                        del self._to_tell[call]
                        if call.is_over:
                            self._forget(call)
                    else:
                        await self._call.write(command)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            pass  # the stream is over, which its reader knows
        except Exception:
            _logger.exception("writing to %s failed", self.target.endpoint.address)
            self._call.cancel()

    async def _read(self) -> None:
        ending: BaseException = asyncio.CancelledError()  # where the channel is closed
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self._has_answered = True
                self.target.heard_s = asyncio.get_running_loop().time()
                for item in message.events:
                    call = self._calls.get(item.id)
                    if call is not None and not call.is_over:
                        self._deliver(call, item)
            ending = broken("it ended the stream early")
        except grpc.aio.AioRpcError as error:
            ending = error
        except Exception as error:
            _logger.exception("reading from %s failed", self.target.endpoint.address)
            ending = broken(str(error))
        finally:
            self._end(ending)

    def _deliver(self, call: SequenceCall, item: target_pb2.SequenceEvent) -> None:
        if item.HasField("event"):
            call.put(item.event)
        else:
            error = rpc_error_of(item.error)
            call.end(error)
            if isinstance(from_rpc_error(error), Draining):
                self._go_elsewhere()
        if call.is_over:
            self._forget(call)

    def _forget(self, call: SequenceCall) -> None:
        self._calls.pop(call.id, None)
        if self._is_left and not self._calls:
            self._call.cancel()

    def _go_elsewhere(self) -> None:
        """Start nothing here any more: whoever is at this address next is asked over a new connection."""
        self._is_left = True
        self._leave(self)

    def _end(self, ending: BaseException) -> None:
        """End what runs here as the stream did."""
        self._is_left = True
        is_unknown = not self._has_answered and _is_unimplemented(ending)
        self._leave(self, is_unknown=is_unknown)
        self._writing.cancel()
        self._call.cancel()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if is_unknown:
                call.replace(self._stub.RunSequence)
            else:
                call.end(ending)


def _incarnation(target: Target) -> int:
    return target.status.target.incarnation if target.status is not None else 0


def _is_unimplemented(ending: BaseException) -> bool:
    return isinstance(ending, grpc.aio.AioRpcError) and ending.code() is grpc.StatusCode.UNIMPLEMENTED
