"""Dense draft distributions on their way to one target: its process group, and what the engine puts into it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from specpool.errors import SpecPoolError
from specpool.v1 import speculator_pb2
from specpool_engine.distributions.group import CREATION_S, SPECULATOR_RANK, GroupMaker, PairGroup
from specpool_engine.distributions.stream_store import StreamStore
from specpool_engine.distributions.transport import BODY_TYPES, Transport
from specpool_engine.distributions.worker import PairWorker

_TYPE_NAMES: Final = {dtype: name for name, dtype in BODY_TYPES.items()}

Deliver = Callable[[Sequence[speculator_pb2.SpeculateResponse]], None]


class Channel(Protocol):
    """What carries dense rows to a target."""

    def offer(self, rows: Tensor) -> speculator_pb2.DenseTransfer | None:
        """Queue rows [K, V'] and return their announcement; None if they cannot be sent. Must not block."""
        ...


class GroupChannel:
    """One group that is up, as the engine sees it. `offer` is called from the engine thread alone."""

    def __init__(self, group: int, worker: PairWorker, on_sent: Callable[[int], None]) -> None:
        self._group = group
        self._worker = worker
        self._on_sent = on_sent
        self._numbers = itertools.count(1)

    def offer(self, rows: Tensor) -> speculator_pb2.DenseTransfer | None:
        """Queue `rows`, which nobody may write to any more; None if the group is not there or is full."""
        number, num_bytes = next(self._numbers), rows.nbytes
        computed = torch.cuda.current_stream(rows.device).record_event() if rows.is_cuda else None

        def send(group: PairGroup) -> None:
            if computed is not None:
                computed.synchronize()
            group.send(rows.to(group.device), number)
            self._on_sent(num_bytes)

        if not self._worker.submit(send, num_bytes):
            return None
        return speculator_pb2.DenseTransfer(
            group=self._group,
            number=number,
            num_rows=rows.shape[0],
            vocab_size=rows.shape[1],
            dtype=_TYPE_NAMES[rows.dtype],
        )


class SendingGroup:
    """The groups of one target's stream, one after the other. Used from the event loop."""

    def __init__(
        self,
        transport: Transport,
        *,
        peer_host: str,
        device: torch.device,
        deliver: Deliver,
        on_up: Callable[[Channel], None],
        on_down: Callable[[Channel], None],
        on_sent: Callable[[int], None],
    ) -> None:
        """Begin without a group.

        Args:
            transport: agreed with the target.
            peer_host: the target's machine as seen from here.
            device: of the draft model.
            deliver: sends to the target; called from any thread.
            on_up: told of a group that is there, on the group's thread.
            on_down: told that it is lost or closed, on any thread.
            on_sent: told of bytes sent, on the group's thread.
        """
        self._transport = transport
        self._peer_host = peer_host
        self._device = device
        self._deliver = deliver
        self._on_up = on_up
        self._on_down = on_down
        self._on_sent = on_sent
        self._number = 0
        self._store: StreamStore | None = None
        self._worker: PairWorker | None = None
        self._channel: GroupChannel | None = None

    @property
    def transport(self) -> Transport:
        """The transport agreed with the target."""
        return self._transport

    @property
    def is_up(self) -> bool:
        """Whether a group is there."""
        return self._worker is not None and self._worker.is_up

    def open(self, number: int) -> None:
        """Build group `number`, for which the target asked; the one before is given up."""
        if not self._transport.is_dense or number <= self._number:
            return
        self.close()
        self._number = number

        def send_key(key: str, value: bytes) -> None:
            message = speculator_pb2.GroupKey(group=number, key=key, value=value)
            self._deliver([speculator_pb2.SpeculateResponse(group_key=message)])

        self._store = StreamStore(send_key, CREATION_S)
        maker = GroupMaker(
            transport=self._transport,
            rank=SPECULATOR_RANK,
            store=self._store,
            peer_host=self._peer_host,
            device=self._device,
        )
        worker = PairWorker(
            maker,
            on_up=lambda: self._on_up(channel),
            on_down=lambda error: self._lost(number, channel, error),
            name=f"distributions to {self._peer_host}",
        )
        channel = GroupChannel(number, worker, self._on_sent)
        self._worker, self._channel = worker, channel
        worker.start()

    def receive_key(self, message: speculator_pb2.GroupKey) -> None:
        """Take in a key for the rendezvous that the target set."""
        if self._store is not None and message.group == self._number:
            self._store.receive(message.key, message.value)

    def close(self) -> None:
        """End the group: the stream ended, or another group follows."""
        if self._worker is not None and self._channel is not None:
            self._worker.close()
            self._on_down(self._channel)
        self._worker = self._channel = self._store = None

    def _lost(self, number: int, channel: Channel, error: SpecPoolError) -> None:
        self._on_down(channel)
        closed = speculator_pb2.GroupClosed(group=number, reason=error.message)
        self._deliver([speculator_pb2.SpeculateResponse(group_closed=closed)])
