"""A pool with one speculator that nobody serves: tests say what it sends, and see what it is told."""

from __future__ import annotations

import asyncio

from specpool.discovery.discovery import StaticDiscovery
from specpool.speculation import Connection, PoolEvents, PoolIdentity, SpeculationPool
from specpool.v1 import speculator_pb2, types_pb2

LOOKAHEAD = 4


class Listener:
    """Of a connection that nobody serves."""

    def stale_message(self): ...


class OneSpeculator(SpeculationPool):
    """Not started: every sequence goes to `connection`, where there is one, and what it is told stays in the outbox."""

    def __init__(self, events: PoolEvents | None = None, *, vocab_size: int = 24, is_connected: bool = True) -> None:
        identity = PoolIdentity(peer=types_pb2.Peer(id="target"), model=types_pb2.ModelInfo(vocab_size=vocab_size))
        loop = asyncio.get_running_loop()
        super().__init__(StaticDiscovery(()), identity, loop=loop, events=events, flushes_itself=False)
        self.connection: Connection | None = None
        if is_connected:
            self.connect()

    def connect(self) -> Connection:
        ack = speculator_pb2.HelloAck(max_lookahead=LOOKAHEAD)
        self.connection = Connection("a:1", None, ack, round_trip_s=0.0, listener=Listener())
        return self.connection

    def place(self, handle):
        if self.connection is not None:
            handle.move(self.connection)

    def hurry(self): ...

    def deliver(self): ...

    def told(self) -> list[str]:
        return [request.WhichOneof("message") for _, requests in self.outbox.take() for request in requests]
