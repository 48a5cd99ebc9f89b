"""Dense draft distributions on their way from one speculator: its process group, and what comes out of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from specpool.backoff import Backoff
from specpool.errors import ProtocolMismatch, SpecPoolError
from specpool.speculation import Deliver
from specpool.v1 import speculator_pb2
from specpool_engine.distributions.group import CREATION_S, TARGET_RANK, GroupMaker, PairGroup
from specpool_engine.distributions.stream_store import StreamStore
from specpool_engine.distributions.transport import BODY_TYPES, Transport
from specpool_engine.distributions.worker import PairWorker
from specpool_target.verify.arrived_distributions import ArrivedDistributions, read_dense

_logger = logging.getLogger(__name__)
_FIRST_BACKOFF_S: Final = 1.0
_MAX_BACKOFF_S: Final = 60.0

Request = speculator_pb2.SpeculateRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseReceiver:
    """What the groups of every connection need from this target; implements `specpool.speculation.DenseReceiver`."""

    transports: Sequence[int]
    """Transports that this target offers, as numbers of the protocol's `DistributionTransport`."""
    device: torch.device
    """Device of the target's model."""
    vocab_size: int
    """Size of the vocabulary of the target's model."""
    on_received: Callable[[int], None] = lambda num_bytes: None
    """Called with the number of bytes received, on the group's thread."""

    def group(
        self, transport: int, *, peer_host: str, send: Callable[[Request], None], on_change: Callable[[], None]
    ) -> ReceivingGroup:
        """Make the groups of a new connection; none is asked for yet."""
        return ReceivingGroup(Transport(transport), self, peer_host=peer_host, send=send, on_change=on_change)


class ReceivingGroup:
    """The groups of one connection, one after the other: asked for, built beside the stream, built again when lost.

    Used from the event loop.
    """

    def __init__(
        self,
        transport: Transport,
        receiver: DenseReceiver,
        *,
        peer_host: str,
        send: Callable[[Request], None],
        on_change: Callable[[], None],
    ) -> None:
        """Begin without a group.

        Args:
            transport: agreed in the handshake.
            receiver: of this target.
            peer_host: the speculator's machine as seen from here.
            send: sends to the speculator; called on the event loop.
            on_change: told, on the event loop, that the group is there or is lost.
        """
        self._transport = transport
        self._receiver = receiver
        self._peer_host = peer_host
        self._send = send
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._number = 0
        self._store: StreamStore | None = None
        self._worker: PairWorker | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._backoff = Backoff(first_s=_FIRST_BACKOFF_S, longest_s=_MAX_BACKOFF_S)
        self.error = ""
        """Why the last group is not there."""

    @property
    def is_up(self) -> bool:
        """Whether the group was made and is not lost."""
        return self._worker is not None and self._worker.is_up

    def open(self) -> None:
        """Ask for the next group and begin to build it. Returns at once."""
        self._number += 1
        number = self._number
        self._send(Request(open_group=speculator_pb2.OpenGroup(group=number)))

        def send_key(key: str, value: bytes) -> None:
            message = Request(group_key=speculator_pb2.GroupKey(group=number, key=key, value=value))
            self._on_loop(partial(self._send_of, number, message))

        self._store = StreamStore(send_key, CREATION_S)
        maker = GroupMaker(
            transport=self._transport,
            rank=TARGET_RANK,
            store=self._store,
            peer_host=self._peer_host,
            device=self._receiver.device,
        )
        self._worker = PairWorker(
            maker,
            on_up=lambda: self._on_loop(partial(self._came_up, number)),
            on_down=lambda error: self._on_loop(partial(self._lost, number, error)),
            name=f"distributions from {self._peer_host}",
            is_receiver=True,
        )
        self._worker.start()

    def receive_key(self, message: speculator_pb2.GroupKey) -> None:
        """Take in a key for the rendezvous that the speculator set."""
        if self._store is not None and message.group == self._number:
            self._store.receive(message.key, message.value)

    def closed(self, message: speculator_pb2.GroupClosed) -> None:
        """Give the group up: the speculator's side is lost."""
        self._lost(message.group, SpecPoolError(message.reason))

    def announce(self, message: speculator_pb2.DraftDistributions, deliver: Deliver) -> None:
        """Expect a transfer: `deliver` is called with what it brings, on any thread, or with None if it cannot come."""
        transfer, tokens = message.transfer, tuple(message.draft_tokens)
        if self._worker is None or transfer.group != self._number:
            deliver(ArrivedDistributions(tokens, None))
            return
        error = self._fault(message)
        if error is None:
            job = partial(_receive, message, deliver, self._receiver)
            num_bytes = transfer.num_rows * transfer.vocab_size * BODY_TYPES[transfer.dtype].itemsize
            if self._worker.submit(job, num_bytes):
                return
            error = "more dense distributions are announced than arrive"
        # What was announced is sent: without a receiver for it the group is of no use any more.
        deliver(ArrivedDistributions(tokens, None))
        self._lost(self._number, ProtocolMismatch(error))

    def close(self) -> None:
        """End the groups with their connection. Returns at once; the thread ends by itself."""
        if self._retry is not None:
            self._retry.cancel()
        if self._worker is not None:
            self._worker.close()
        self._worker = self._store = self._retry = None
        self._number += 1

    def _fault(self, message: speculator_pb2.DraftDistributions) -> str | None:
        transfer = message.transfer
        num_dense = sum(not row.token_ids for row in message.distributions)
        if transfer.dtype not in BODY_TYPES:
            return f"a dense distribution has the type {transfer.dtype!r}"
        if not 0 < transfer.num_rows == num_dense:
            return f"{num_dense} dense distributions are announced in {transfer.num_rows} rows"
        if not 0 < transfer.vocab_size <= self._receiver.vocab_size:
            return f"a dense distribution has {transfer.vocab_size} tokens, the target {self._receiver.vocab_size}"
        return None

    def _send_of(self, number: int, request: Request) -> None:
        if number == self._number:
            self._send(request)

    def _came_up(self, number: int) -> None:
        if number == self._number:
            self.error = ""
            self._backoff.reset()
            _logger.info("dense distributions come from %s over %s", self._peer_host, self._transport.label)
            self._on_change()

    def _lost(self, number: int, error: SpecPoolError) -> None:
        if number != self._number or self._worker is None:
            return
        _logger.warning(
            "no %s group with %s, distributions are sparse: %s",
            self._transport.label, self._peer_host, error.message,
        )  # fmt: skip
        self._worker.close()
        self._worker = self._store = None
        self.error = error.message
        self._on_change()
        self._retry = self._loop.call_later(self._backoff.next_s(), self.open)

    def _on_loop(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed: the process is ending
            return


def _receive(
    message: speculator_pb2.DraftDistributions, deliver: Deliver, receiver: DenseReceiver, group: PairGroup
) -> None:
    transfer = message.transfer
    body = torch.empty(transfer.num_rows, transfer.vocab_size, dtype=BODY_TYPES[transfer.dtype], device=group.device)
    group.receive(body, transfer.number)
    receiver.on_received(body.nbytes)
    distribution = read_dense(message, body, vocab_size=receiver.vocab_size, device=receiver.device)
    if receiver.device.type == "cuda":
        torch.cuda.current_stream(receiver.device).synchronize()  # the engine has a stream of its own
    deliver(ArrivedDistributions(tuple(message.draft_tokens), distribution))
