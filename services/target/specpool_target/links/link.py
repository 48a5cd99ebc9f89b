"""The connection to one speculator: one bidirectional stream for all sequences, on the asyncio side.

Tables go straight into each sequence's `SpeculationInbox`, where the engine thread finds them: a hit is a dictionary
lookup and never a network wait. Everything else the engine has to know goes through its command queue.

An *epoch* numbers the connections of a link, so that nothing meant for one stream is ever written to its successor.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import grpc.aio

from specpool.addresses import parse_address
from specpool.algorithm.fallback import DraftTimes
from specpool.errors import (
    ProtocolMismatch,
    SpecPoolError,
    SpeculatorUnavailable,
    TokenizerMismatch,
    TransportUnavailable,
)
from specpool.rpc.client import channel
from specpool.rpc.errors import from_rpc_error
from specpool.speculation.handshake import check_ack
from specpool.v1 import speculator_pb2, speculator_pb2_grpc, target_pb2, types_pb2
from specpool_engine.distributions.transport import Transport
from specpool_target.dense.receiving_group import DenseReceiver, ReceivingGroup
from specpool_target.links.inbox import Distributions, SpeculationInbox
from specpool_target.verify.arrived_distributions import ArrivedDistributions

_logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S: Final = 0.1
_MAX_BACKOFF_S: Final = 2.0
_REFUSED_BACKOFF_S: Final = 15.0
"""After a handshake that will be refused again until somebody deploys something else."""
_HANDSHAKE_S: Final = 5.0
_CLOSE_S: Final = 1.0
_IDLE_S: Final = 60.0
"""A link that is not connected and has no sequence is given up after this."""

Request = speculator_pb2.SpeculateRequest


class LinkListener(Protocol):
    """The engine, as a link sees it. Every method may be called from the event loop and returns at once."""

    def link_up(self, link: SpeculatorLink, epoch: int) -> None:
        """A connection was made: open the live sequences on it."""

    def link_down(self, link: SpeculatorLink, epoch: int) -> None:
        """The connection is lost: stop waiting for it."""

    def transport_changed(self, link: SpeculatorLink) -> None:
        """Draft distributions come another way from now on."""

    def resync(self, sequence_id: str) -> None:
        """Open this sequence again."""

    def speculation(self, sequence_id: str, round_: int, tokens: Sequence[int]) -> None:
        """An answer to speculate_now."""

    def distributions_arrived(self) -> None:
        """Some sequence's inbox has new distributions."""

    def stale_message(self) -> None:
        """Something about an unknown sequence was dropped."""


@dataclass(slots=True)
class LinkMeasurements:
    """What the engine knows of a link without asking; written by the event loop."""

    max_lookahead: int = 0
    """Agreed in the handshake."""
    draft_step_s: float = 0.0
    """From the last load report; 0: none yet."""
    round_trip_s: float = 0.0
    """Of the handshake."""
    last_push_s: float = 0.0
    """When the last table came, which is at the end of a draft step (`perf_counter`)."""
    num_received: int = 0
    """Messages of its engine so far: tells a speculator that is silent."""

    def draft_times(self) -> DraftTimes:
        """Of tokens drafted now: the running step has to end first."""
        running_s = self.last_push_s + self.draft_step_s - time.perf_counter()
        left_s = min(max(running_s, 0.0), self.draft_step_s)
        return DraftTimes(first_s=self.round_trip_s + left_s + self.draft_step_s, step_s=self.draft_step_s)


@dataclass(kw_only=True, slots=True)
class _Connection:
    epoch: int
    call: Any
    outgoing: asyncio.Queue[Request] = field(default_factory=asyncio.Queue)


class SpeculatorLink:
    """Keeps one endpoint connected, as long as sequences use it."""

    def __init__(
        self,
        endpoint: str,
        *,
        hello: Callable[[], speculator_pb2.Hello],
        listener: LinkListener,
        receiver: DenseReceiver,
        on_closed: Callable[[SpeculatorLink], None] = lambda link: None,
    ) -> None:
        self.endpoint = endpoint
        self.measured = LinkMeasurements()
        self.peer: types_pb2.Peer | None = None
        self._agreed: Transport | None = None
        self._group: ReceivingGroup | None = None
        self._receiver = receiver
        self.last_error = ""
        self._hello = hello
        self._listener = listener
        self._on_closed = on_closed
        self._inboxes: dict[str, SpeculationInbox] = {}
        self._connection: _Connection | None = None
        self._epoch = 0
        self._tried = asyncio.Event()
        self._unused_since_s = time.monotonic()
        self._task = asyncio.create_task(self._run(), name=f"speculator link {endpoint}")

    @property
    def is_connected(self) -> bool:
        """Whether the handshake succeeded and the stream is up."""
        return self._connection is not None

    @property
    def transport(self) -> str:
        """Of draft distributions, in use now: without its group a dense one is not."""
        is_dense = self._agreed is not None and self._group is not None and self._group.is_up
        return self._agreed.label if is_dense and self._agreed is not None else Transport.GRPC.label

    def status(self) -> target_pb2.SpeculatorLinkStatus:
        """For GetTargetStatus."""
        return target_pb2.SpeculatorLinkStatus(
            endpoint=self.endpoint,
            speculator=self.peer,
            connected=self.is_connected,
            transport=self.transport if self.is_connected else "",
            last_error=self.last_error,
            round_trip_ms=self.measured.round_trip_s * 1e3,
            agreed_transport=self._agreed.label if self._agreed is not None and self.is_connected else "",
            group_error=self._group.error if self._group is not None else "",
        )

    def touch(self) -> None:
        """Somebody is about to use it."""
        self._unused_since_s = time.monotonic()

    async def wait_first_attempt(self, timeout_s: float) -> None:
        """Until the first handshake succeeded or failed; at once for a link that was tried before."""
        if not self._tried.is_set():
            try:
                await asyncio.wait_for(self._tried.wait(), timeout_s)
            except TimeoutError:
                self._tried.set()  # nobody else has to wait

    def add_sequence(self, sequence_id: str, inbox: SpeculationInbox) -> None:
        """Messages about the sequence go to `inbox` from now on."""
        self._inboxes[sequence_id] = inbox

    def remove_sequence(self, sequence_id: str) -> None:
        """Tell the speculator at once, without asking the engine."""
        if self._inboxes.pop(sequence_id, None) is not None and self._connection is not None:
            self.send(self._connection.epoch, [close_request(sequence_id)])
        self._unused_since_s = time.monotonic()

    def send(self, epoch: int, requests: Sequence[Request]) -> None:
        """Queue messages for the stream of `epoch`; dropped if that is gone."""
        if self._connection is not None and self._connection.epoch == epoch:
            for request in requests:
                self._connection.outgoing.put_nowait(request)

    async def close(self) -> None:
        """Half-close, so that the speculator sees a clean end."""
        if self._connection is not None:
            with suppress(TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await asyncio.wait_for(self._connection.call.done_writing(), _CLOSE_S)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        async with channel(self.endpoint) as connection:
            stub = speculator_pb2_grpc.SpeculatorServiceStub(connection)
            while not self._is_idle():
                started_epoch = self._epoch
                error = await self._attempt(stub)
                if self._epoch != started_epoch:
                    backoff_s = _FIRST_BACKOFF_S
                is_refused = isinstance(error, TokenizerMismatch | ProtocolMismatch | TransportUnavailable)
                self._note(error)
                await asyncio.sleep(_REFUSED_BACKOFF_S if is_refused else backoff_s)
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
            self._on_closed(self)

    def _is_idle(self) -> bool:
        return not self._inboxes and time.monotonic() - self._unused_since_s > _IDLE_S

    def _note(self, error: SpecPoolError) -> None:
        if error.message != self.last_error:
            _logger.warning("speculator %s: %s", self.endpoint, error.message)
        self.last_error = error.message

    async def _attempt(self, stub: Any) -> SpecPoolError:
        """One connection, from handshake to loss; returns why it ended."""
        try:
            call = stub.Speculate()
            try:
                await asyncio.wait_for(self._handshake(call), _HANDSHAKE_S)
                await self._serve(call)
            finally:
                call.cancel()
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error, unavailable=SpeculatorUnavailable)
        except SpecPoolError as error:
            return error
        except TimeoutError:
            return SpeculatorUnavailable(f"no answer to hello within {_HANDSHAKE_S:g} s")
        finally:
            self._tried.set()
        return SpeculatorUnavailable("the speculator ended the stream")

    async def _handshake(self, call: Any) -> None:
        await call.wait_for_connection()
        started_s = time.perf_counter()
        hello = self._hello()
        await call.write(Request(hello=hello))
        response = await call.read()
        if response is grpc.aio.EOF:
            # The status has the reason; reading it raises.
            if await call.code() is not grpc.StatusCode.OK:
                raise await _error_of(call)
            raise ProtocolMismatch("the speculator ended the stream instead of answering hello")
        if response.WhichOneof("message") != "hello_ack":
            raise ProtocolMismatch(f"hello was answered with {response.WhichOneof('message')}")
        check_ack(hello, response.hello_ack)
        self._accept(response.hello_ack, time.perf_counter() - started_s)

    def _accept(self, ack: speculator_pb2.HelloAck, round_trip_s: float) -> None:
        self.peer = ack.speculator
        self._agreed = Transport(ack.transport)
        self.last_error = ""
        self.measured.max_lookahead = ack.max_lookahead
        self.measured.round_trip_s = round_trip_s
        _logger.info("speculator %s connected (%s)", self.endpoint, ack.speculator.id)

    async def _serve(self, call: Any) -> None:
        self._epoch += 1
        connection = self._connection = _Connection(epoch=self._epoch, call=call)
        self._listener.link_up(self, connection.epoch)
        self._open_group(connection)
        self._tried.set()
        writer = asyncio.create_task(_write(call, connection.outgoing))
        try:
            await self._read(call)
            if await call.code() is not grpc.StatusCode.OK:
                raise await _error_of(call)
        finally:
            self._connection = None
            if self._group is not None:
                self._group.close()
                self._group = None
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            self._listener.link_down(self, connection.epoch)

    def _open_group(self, connection: _Connection) -> None:
        """Begin to build the process group; nothing waits for it."""
        if self._agreed is not None and self._agreed.is_dense:
            self._group = ReceivingGroup(
                self._agreed,
                self._receiver,
                peer_host=parse_address(self.endpoint)[0],
                send=connection.outgoing.put_nowait,
                on_change=lambda: self._listener.transport_changed(self),
            )
            self._group.open()

    async def _read(self, call: Any) -> None:
        while (response := await call.read()) is not grpc.aio.EOF:
            kind = response.WhichOneof("message")
            # Load reports come from the speculator's event loop: they say nothing about its engine.
            self.measured.num_received += kind != "load"
            if kind == "go_away":
                await call.done_writing()
                raise SpeculatorUnavailable(f"the speculator is draining: {response.go_away.reason}")
            self._dispatch(kind, response)

    def _dispatch(self, kind: str | None, response: speculator_pb2.SpeculateResponse) -> None:
        if kind == "tables":
            self.measured.last_push_s = time.perf_counter()
            for table in response.tables.tables:
                if (inbox := self._inbox(table.sequence_id)) is not None:
                    inbox.add_table(table)
        elif kind == "speculation":
            reply = response.speculation
            if self._inbox(reply.sequence_id) is not None:
                self._listener.speculation(reply.sequence_id, reply.round, list(reply.draft_tokens))
        elif kind == "draft_distributions":
            self._take_distributions(response.draft_distributions)
        elif kind == "group_key" and self._group is not None:
            self._group.receive_key(response.group_key)
        elif kind == "group_closed" and self._group is not None:
            self._group.closed(response.group_closed)
        elif kind == "resync":
            if self._inbox(response.resync.sequence_id) is not None:
                self._listener.resync(response.resync.sequence_id)
        elif kind == "load":
            self.measured.draft_step_s = response.load.load.step_ms / 1e3

    def _take_distributions(self, message: speculator_pb2.DraftDistributions) -> None:
        inbox = self._inbox(message.sequence_id)

        def deliver(distributions: Distributions) -> None:
            if inbox is not None:
                inbox.add_distributions(message.round, distributions)
                self._listener.distributions_arrived()

        if not message.HasField("transfer"):
            deliver(message)
        elif self._group is None:
            deliver(ArrivedDistributions(tuple(message.draft_tokens), None))
        else:
            self._group.announce(message, deliver)  # also for a sequence that is gone: it was sent

    def _inbox(self, sequence_id: str) -> SpeculationInbox | None:
        inbox = self._inboxes.get(sequence_id)
        if inbox is None:
            self._listener.stale_message()
        return inbox


async def _write(call: Any, outgoing: asyncio.Queue[Request]) -> None:
    # A write that fails means the stream has ended, which the reader reports.
    while True:
        await call.write(await outgoing.get())


async def _error_of(call: Any) -> SpecPoolError:
    error = grpc.aio.AioRpcError(
        await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
    )
    return from_rpc_error(error, unavailable=SpeculatorUnavailable)


def close_request(sequence_id: str) -> Request:
    """Frees the sequence at the speculator."""
    return Request(close_sequence=speculator_pb2.CloseSequence(sequence_id=sequence_id))


class LinkRegistry:
    """The links of one target, by endpoint."""

    def __init__(
        self, hello: Callable[[], speculator_pb2.Hello], listener: LinkListener, receiver: DenseReceiver
    ) -> None:
        self._receiver = receiver
        self._hello = hello
        self._listener = listener
        self._links: dict[str, SpeculatorLink] = {}

    def get(self, endpoint: str) -> SpeculatorLink:
        """The link to `endpoint`, made if need be."""
        link = self._links.get(endpoint)
        if link is None:
            link = SpeculatorLink(
                endpoint,
                hello=self._hello,
                listener=self._listener,
                receiver=self._receiver,
                on_closed=self._forget,
            )
            self._links[endpoint] = link
        link.touch()
        return link

    def _forget(self, link: SpeculatorLink) -> None:
        if self._links.get(link.endpoint) is link:
            del self._links[link.endpoint]

    def statuses(self) -> list[target_pb2.SpeculatorLinkStatus]:
        """Of all links."""
        return [link.status() for link in self._links.values()]

    async def close(self) -> None:
        """End all streams cleanly."""
        await asyncio.gather(*(link.close() for link in self._links.values()))
        self._links.clear()
