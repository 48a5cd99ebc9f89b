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
        """Why they cannot, or nothing."""
        ...

    def open(self) -> None:
        """Begin to build it, beside everything else."""
        ...

    def receive_key(self, message: speculator_pb2.GroupKey) -> None:
        """The speculator said something about it."""
        ...

    def closed(self, message: speculator_pb2.GroupClosed) -> None:
        """The speculator gave its side up."""
        ...

    def announce(self, message: speculator_pb2.DraftDistributions, deliver: Deliver) -> None:
        """A transfer comes. `deliver` is called once: also when nothing can come."""
        ...

    def close(self) -> None:
        """The connection ended."""
        ...


class DenseReceiver(Protocol):
    """Makes a group for each connection that agreed on a transport other than the stream."""

    @property
    def transports(self) -> Sequence[int]:
        """What to offer, `DISTRIBUTION_TRANSPORT_GRPC` included where that is acceptable, the best first."""
        ...

    def group(
        self, transport: int, *, peer_host: str, send: Callable[[Request], None], on_change: Callable[[], None]
    ) -> DenseGroup:
        """For a new connection.

        Args:
            transport: agreed in the handshake.
            peer_host: the speculator's machine as seen from here.
            send: sends to the speculator; to be called on the pool's event loop.
            on_change: to be called, on that loop, when the group is there or is lost.
        """
        ...
