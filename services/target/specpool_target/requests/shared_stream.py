"""Many sequences of one router over one stream.

What the engine hands over for all of them is collected, and written as one message; what comes while that is on its way
goes into the next. No sequence has a task of its own once it runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from opentelemetry.trace import Span, SpanKind

from specpool.errors import Draining, InvalidArgument
from specpool.request_limits import invalid_value
from specpool.rpc.errors import to_status
from specpool.rpc.interceptors import told_error
from specpool.telemetry import tracing
from specpool.v1 import target_pb2
from specpool_target.engine.sequence import SequenceUpdate
from specpool_target.requests.intake import Intake
from specpool_target.requests.response_stream import Response, ResponseStream

Message = target_pb2.RunSequencesResponse
_METHOD: Final = "RunSequences"
_MAX_ITEMS: Final = 1000
"""Most updates that one message carries: it stays far below the largest message, however long the one before took."""
_Item = SequenceUpdate | Response | Exception


@dataclass(eq=False, slots=True)
class _Member:
    """A sequence of the stream."""

    id: int
    span: Span
    task: asyncio.Task[None] | None = None
    """Reads the request, until the engine has the sequence."""
    stream: ResponseStream | None = None
    is_over: bool = False
    """Whether it is cancelled, or its last message is made."""
    held: list[_Item] | None = field(default=None)
    """What waits for the router to let it go on; None: nothing has to wait. Bounded by the length of the output."""


class SharedStream:
    """One stream of the target. Used on the event loop."""

    def __init__(self, intake: Intake, span_name: str) -> None:
        self._intake = intake
        self._span_name = span_name
        self._members: dict[int, _Member] = {}
        self._last_id = 0
        self._pending: list[tuple[_Member, _Item]] = []
        self._ended: list[_Member] = []
        """Those whose last message is on its way."""
        self._wake = asyncio.Event()

    async def run(self, requests: AsyncIterator[target_pb2.RunSequencesRequest]) -> AsyncGenerator[Message, None]:
        """The messages of the stream: the next one is made when the one before is written."""
        listening = asyncio.create_task(self._listen(requests))
        listening.add_done_callback(self._heard_all)
        try:
            with self._intake.telling_of_drain(self._wake.set):
                while True:
                    await self._wake.wait()
                    self._wake.clear()
                    while self._pending:
                        message = self._take()
                        if message.events:
                            yield message
                        self._close(self._ended)
                        self._ended = []
                    if listening.done():
                        listening.result()
                    if not self._members and listening.done():
                        return
                    if not self._members and self._intake.is_draining:
                        raise Draining("this target is draining and takes no new sequences")
        finally:
            listening.cancel()
            self._close([*self._members.values(), *self._ended])

    def _heard_all(self, listening: asyncio.Task[None]) -> None:
        if not listening.cancelled():
            listening.exception()  # is raised by `run`, if that is still there
        self._wake.set()

    # ---- what the router says ---------------------------------------------------------------------------------

    async def _listen(self, requests: AsyncIterator[target_pb2.RunSequencesRequest]) -> None:
        async for request in requests:
            command = request.WhichOneof("command")
            if command is None:
                raise InvalidArgument("the message has no command", metadata={"field": "command"})
            if command == "start":
                self._start(request.start)
            else:
                member = self._member(command, getattr(request, command))
                if member is not None:
                    getattr(self, f"_{command}")(member)

    def _member(self, command: str, sequence_id: int) -> _Member | None:
        """The sequence that a command names; None if it has ended."""
        if not 0 < sequence_id <= self._last_id:
            raise invalid_value(command, sequence_id, "the id of a sequence that was started on this stream")
        return self._members.get(sequence_id)

    def _start(self, start: target_pb2.StartSequence) -> None:
        if start.id <= self._last_id:
            raise invalid_value("start.id", start.id, f"above all ids before it, the last of which is {self._last_id}")
        self._last_id = start.id
        parent = tracing.context_of(start.traceparent)
        member = _Member(start.id, tracing.tracer().start_span(self._span_name, parent, kind=SpanKind.SERVER))
        try:
            self._intake.open(start.request)
        except Exception as error:
            member.span.end()
            self._put(member, error)
            return
        self._members[start.id] = member
        member.task = asyncio.create_task(self._begin(member, start.request))

    def _cancel(self, member: _Member) -> None:
        member.is_over = True
        self._close([member])
        self._wake.set()

    def _hold(self, member: _Member) -> None:
        if member.held is None:
            member.held = []

    def _go_on(self, member: _Member) -> None:
        if member.held is not None:
            held, member.held = member.held, None
            self._pending[:0] = [(member, item) for item in held]
            self._wake.set()

    # ---- one sequence -----------------------------------------------------------------------------------------

    async def _begin(self, member: _Member, request: target_pb2.RunSequenceRequest) -> None:
        try:
            stream = await self._intake.read(request, member.span)
            request_id = request.request.request_id or stream.request.id
            if stream.is_complete is not None:
                for response in stream.whole(request_id, stream.is_complete):
                    self._put(member, response)
                return
            self._intake.submit(stream, partial(self._put, member))
            member.stream = stream
            self._put(member, stream.started(request_id))
        except Exception as error:
            self._put(member, error)

    def _put(self, member: _Member, item: _Item) -> None:
        self._pending.append((member, item))
        self._wake.set()

    def _close(self, members: Iterable[_Member]) -> None:
        """Be done with sequences, whether they have ended or not."""
        for member in members:
            member.is_over = True
            if self._members.pop(member.id, None) is not None:
                if member.task is not None:
                    member.task.cancel()
                member.span.end()
                self._intake.close(member.stream)

    # ---- what the router is told ------------------------------------------------------------------------------

    def _take(self) -> Message:
        """The message for what is pending."""
        message = Message()
        taken, self._pending = self._pending[:_MAX_ITEMS], self._pending[_MAX_ITEMS:]
        for member, item in taken:
            if member.is_over:
                continue
            if member.held is not None:
                member.held.append(item)
                continue
            try:
                self._write(message.events, member, item)
            except Exception as error:
                status = to_status(told_error(_METHOD, error)).SerializeToString()
                message.events.add(id=member.id, error=status)
                self._end(member)
        return message

    def _write(self, events: Any, member: _Member, item: _Item) -> None:
        if isinstance(item, Exception):
            raise item
        if isinstance(item, SequenceUpdate):
            assert member.stream is not None, "else it has no updates"
            for response in member.stream.responses(item):
                events.add(id=member.id, event=response)
            if item.is_last:
                self._end(member)
        else:
            events.add(id=member.id, event=item)
            if item.HasField("finished"):
                self._end(member)

    def _end(self, member: _Member) -> None:
        member.is_over = True
        self._ended.append(member)
