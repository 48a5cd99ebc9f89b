"""Dense draft distributions come another way than the stream: what a transport for them must be.

The ground floor has none: tensors belong to engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from specpool.v1 import speculator_pb2

Request = speculator_pb2.SpeculateRequest
Deliver = Callable[[object], None]
"""Takes what arrived, in the transport's own type, on any thread; the engine finds it at the sequence."""


class DenseGroup(Protocol):
    """The transport of one connection, used from the pool's event loop. Nothing here may block."""

    @property
    def is_up(self) -> bool:
        """Whether dense distributions can come now."""
        ...

    @property
    def error(self) -> str:
        """Why they cannot come; empty if they can."""
        ...

    def open(self) -> None:
        """Begin to build the group, beside everything else."""
        ...

    def receive_key(self, message: speculator_pb2.GroupKey) -> None:
        """Take in a key for the rendezvous that the speculator set."""
        ...

    def closed(self, message: speculator_pb2.GroupClosed) -> None:
        """Give the group up, as the speculator has on its side."""
        ...

    def announce(self, message: speculator_pb2.DraftDistributions, deliver: Deliver) -> None:
        """Expect a transfer. `deliver` is called once, also when nothing can come."""
        ...

    def close(self) -> None:
        """End the group with its connection."""
        ...


class DenseReceiver(Protocol):
    """Makes a group for each connection that agreed on a transport other than the stream."""

    @property
    def transports(self) -> Sequence[int]:
        """The transports to offer, the best first, `DISTRIBUTION_TRANSPORT_GRPC` included where that is acceptable."""
        ...

    def group(
        self, transport: int, *, peer_host: str, send: Callable[[Request], None], on_change: Callable[[], None]
    ) -> DenseGroup:
        """Make the group of a new connection.

        Args:
            transport: agreed in the handshake.
            peer_host: the speculator's machine as seen from here.
            send: sends to the speculator; to be called on the pool's event loop.
            on_change: to be called, on that loop, when the group is there or is lost.
        """
        ...
