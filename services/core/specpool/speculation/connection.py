"""One acknowledged Speculate stream: from its handshake to its loss, for all sequences that are placed there.

Tables go straight to the handles of their sequences, where engines find them: a hit is a dictionary lookup and never
a network wait.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

import grpc.aio

from specpool.addresses import parse_address
from specpool.errors import SpeculatorUnavailable
from specpool.rpc.errors import from_rpc_error
from specpool.speculation.dense import DenseGroup, DenseReceiver
from specpool.speculation.handshake import transport_labels
from specpool.speculation.measurements import Measurements
from specpool.speculation.trust import WaitTrust
from specpool.v1 import speculator_pb2

_logger = logging.getLogger(__name__)
Request = speculator_pb2.SpeculateRequest
_GRPC: Final = speculator_pb2.DISTRIBUTION_TRANSPORT_GRPC
_MAX_UNSENT: Final = 10_000
"""Most messages that a speculator has not read; one that reads none is given up."""
_SHORTEST_SILENCE_S: Final = 5.0
_SILENT_STEPS: Final = 20
"""Draft steps after which an engine that owes an answer counts as stalled."""


class PlacedSequence(Protocol):
    """A sequence in the pool, as connections and the pairing see it."""

    id: str
    placed_at_s: float
    """Time (`monotonic`) at which it was given its speculator."""
    avoided: dict[str, float]
    """Addresses of speculators that refused it, each with the time (`monotonic`) until which it is not placed there."""

    @property
    def is_placed(self) -> bool:
        """Whether it has a speculator, or needs none."""
        ...

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        ...

    def move(self, connection: Connection | None) -> None:
        """Leave one speculator for another, or for none."""

    def lost(self, connection: Connection) -> bool:
        """Leave a connection that has ended, or does not have the sequence; False if it had moved already."""
        ...

    def take_table(self, connection: Connection, table: speculator_pb2.Table) -> None:
        """Take in guesses about the running round."""

    def take_speculation(self, connection: Connection, reply: speculator_pb2.Speculation) -> None:
        """Take in the answer to a speculate_now."""

    def add_distributions(self, connection: Connection, round_: int, distributions: object) -> None:
        """Take in draft distributions of the tokens that a round verifies; called on any thread."""

    def reopen(self, connection: Connection) -> None:
        """Open the sequence again at a speculator that lost it; at most once per round."""


class ConnectionListener(Protocol):
    """The pool, as a connection sees it; called from the event loop."""

    def going_away(self, connection: Connection, reason: str) -> None:
        """Note that the speculator drains."""

    def refused(self, connection: Connection, refusal: speculator_pb2.SequenceRefused) -> None:
        """Note that the speculator does not hold a sequence (any more)."""

    def transport_changed(self, connection: Connection) -> None:
        """Note that draft distributions come another way from now on."""

    def stale_message(self) -> None:
        """Note that a message about an unknown sequence was dropped."""


class Connection:
    """One stream. All but `attach` and `detach` belongs to the event loop; attributes may be read from any thread."""

    def __init__(
        self,
        address: str,
        call: Any,
        ack: speculator_pb2.HelloAck,
        *,
        round_trip_s: float,
        listener: ConnectionListener,
        receiver: DenseReceiver | None = None,
    ) -> None:
        self.address = address
        self.ack = ack
        """Answer to the handshake: who is at the other end, and what was agreed."""
        self.measured = Measurements(max_lookahead=ack.max_lookahead, round_trip_s=round_trip_s)
        self.measured.take_load(ack.load, 0)
        self.trust = WaitTrust(self.measured)
        self.is_open = True
        """Whether the stream has not ended, whoever ends it."""
        self._call = call
        self._listener = listener
        self._placed: dict[str, PlacedSequence] = {}
        self._outgoing: asyncio.Queue[Request | None] = asyncio.Queue()
        self._owes_since_s: float | None = None
        self._group: DenseGroup | None = None
        if receiver is not None and ack.transport != _GRPC:
            self._group = receiver.group(
                ack.transport,
                peer_host=parse_address(address)[0],
                send=self._outgoing.put_nowait,
                on_change=lambda: listener.transport_changed(self),
            )

    # ---- any thread -------------------------------------------------------------------------------------------

    @property
    def num_placed(self) -> int:
        """Number of this pool's sequences that are placed here."""
        return len(self._placed)

    def placed(self) -> list[PlacedSequence]:
        """The sequences of this pool that are placed here."""
        return list(self._placed.values())

    def attach(self, sequence_id: str, sequence: PlacedSequence) -> bool:
        """Deliver messages about the sequence to it from now on; False: too late, the stream has ended."""
        self._placed[sequence_id] = sequence
        return self.is_open

    def detach(self, sequence_id: str) -> None:
        """Deliver nothing to the sequence any more."""
        self._placed.pop(sequence_id, None)

    def expect_answer(self) -> None:
        """Note that something was sent that the speculator's engine answers."""
        if self._owes_since_s is None:
            self._owes_since_s = time.monotonic()

    @property
    def transport(self) -> str:
        """Name of the transport of draft distributions in use: a dense one is in use while its group is up."""
        is_dense = self._group is not None and self._group.is_up
        return transport_labels([self.ack.transport if is_dense else _GRPC])

    @property
    def group_error(self) -> str:
        """Why the agreed transport is not in use; empty if it is."""
        return "" if self._group is None else self._group.error

    def is_stalled(self, now_s: float) -> bool:
        """Whether the speculator's engine has owed an answer for long. Load reports are not its answers."""
        owes_since_s = self._owes_since_s  # read once: the loop may take an answer in meanwhile
        if owes_since_s is None or not self._placed:
            return False
        patience_s = max(_SHORTEST_SILENCE_S, _SILENT_STEPS * self.measured.draft_step_s)
        return now_s - owes_since_s > patience_s

    # ---- the event loop ---------------------------------------------------------------------------------------

    def send(self, requests: Sequence[Request]) -> None:
        """Queue messages; dropped when the stream has ended."""
        if not self.is_open:
            return
        for request in requests:
            self._outgoing.put_nowait(request)
        if self._outgoing.qsize() > _MAX_UNSENT:
            self._call.cancel()

    def half_close(self) -> None:
        """End the stream cleanly, after what is queued."""
        self._outgoing.put_nowait(None)

    async def serve(self) -> None:
        """Read messages until the stream ends; raises unless both sides ended it cleanly."""
        if self._group is not None:
            self._group.open()  # nothing waits for it
        writer = asyncio.create_task(self._write())
        try:
            await self._read()
            if await self._call.code() is not grpc.StatusCode.OK:
                raise await error_of(self._call)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise SpeculatorUnavailable("the speculator does not read what it is sent") from None
        finally:
            self.is_open = False
            if self._group is not None:
                self._group.close()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write(self) -> None:
        # A write that fails means that the stream has ended, which the reader reports.
        while (request := await self._outgoing.get()) is not None:
            await self._call.write(request)
        await self._call.done_writing()

    async def _read(self) -> None:
        while (response := await self._call.read()) is not grpc.aio.EOF:
            kind = response.WhichOneof("message")
            if kind == "load":
                self.measured.take_load(response.load.load, self.num_placed)
                continue
            self.measured.num_received += 1
            self._owes_since_s = None
            try:
                self._dispatch(kind, response)
            except Exception:  # one sequence's error is its own
                _logger.exception("%s of speculator %s could not be taken in", kind, self.address)

    def _dispatch(self, kind: str | None, response: speculator_pb2.SpeculateResponse) -> None:
        if kind == "tables":
            self.measured.last_push_s = time.perf_counter()
            for table in response.tables.tables:
                if (sequence := self.find(table.sequence_id)) is not None:
                    sequence.take_table(self, table)
        elif kind == "speculation":
            if (sequence := self.find(response.speculation.sequence_id)) is not None:
                sequence.take_speculation(self, response.speculation)
        elif kind == "draft_distributions":
            self._take_distributions(response.draft_distributions)
        elif kind == "resync":
            if (sequence := self.find(response.resync.sequence_id)) is not None:
                sequence.reopen(self)
        elif kind == "sequence_refused":
            self._listener.refused(self, response.sequence_refused)
        elif kind == "go_away":
            self._listener.going_away(self, response.go_away.reason)
        elif kind == "group_key" and self._group is not None:
            self._group.receive_key(response.group_key)
        elif kind == "group_closed" and self._group is not None:
            self._group.closed(response.group_closed)

    def _take_distributions(self, message: speculator_pb2.DraftDistributions) -> None:
        sequence = self.find(message.sequence_id)

        def deliver(distributions: object) -> None:
            if sequence is not None:
                sequence.add_distributions(self, message.round, distributions)

        if not message.HasField("transfer") or self._group is None:
            deliver(message)  # without its group, a transfer's message has no distributions
        else:
            self._group.announce(message, deliver)  # also for a sequence that is gone: it was sent

    def find(self, sequence_id: str) -> PlacedSequence | None:
        """The sequence that a message names; None, and counted as stale, if it is not here."""
        sequence = self._placed.get(sequence_id)
        if sequence is None:
            self._listener.stale_message()
        return sequence


async def error_of(call: Any) -> Exception:
    """The error with which a stream ended."""
    error = grpc.aio.AioRpcError(
        await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
    )
    return from_rpc_error(error, unavailable=SpeculatorUnavailable)
