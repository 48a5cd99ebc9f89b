"""A sequence that is closed stays closed at every speculator, whatever happens to it in that moment."""

from __future__ import annotations

import random
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from specpool.speculation import SequenceEvents, SequenceHandle
from specpool.speculation.connection import Connection
from specpool.speculation.outbox import Outbox
from specpool.v1 import speculator_pb2, types_pb2


class Nobody:
    """Listens to connections and owns handles; never places one anew."""

    def __init__(self) -> None:
        self.outbox, self.vocab_size = Outbox(), 100

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **keywords: None


@pytest.fixture
def switches_often() -> Iterator[None]:
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval_s)


def _connection(address: str, nobody: Any) -> Connection:
    ack = speculator_pb2.HelloAck(max_lookahead=4)
    return Connection(address, None, ack, round_trip_s=0.0, listener=nobody)


def _engine(handle: SequenceHandle, num_rounds: int) -> None:
    for _ in range(num_rounds):
        handle.next(0, 1)
        handle.started([2, 3])
    handle.close()


def _pairing(handle: SequenceHandle, connections: list[Connection], rng: random.Random) -> None:
    """What the event loop does to a sequence: resync, moves, and the service's own close after a cancel."""
    for _ in range(rng.randint(0, 6)):
        action = rng.choice(("reopen", "move", "move", "close"))
        if action == "close":
            handle.close()
        else:
            getattr(handle, action)(rng.choice(connections))


def _still_open(outbox: Outbox) -> dict[str, set[str]]:
    """By address, as a speculator that reads in order would hold them."""
    held: dict[str, set[str]] = defaultdict(set)
    for connection, requests in outbox.take():
        for request in requests:
            if request.HasField("open_sequence"):
                held[connection.address].add(request.open_sequence.sequence_id)
            elif request.HasField("close_sequence"):
                held[connection.address].discard(request.close_sequence.sequence_id)
    return {address: ids for address, ids in held.items() if ids}


def test_no_order_of_events_brings_a_closed_sequence_back(switches_often: None) -> None:
    rng = random.Random(9)
    for number in range(400):
        nobody: Any = Nobody()
        connections = [_connection(f"127.0.0.1:{port}", nobody) for port in (1, 2)]
        opening = speculator_pb2.OpenSequence(
            sequence_id=f"s{number}", max_lookahead=4, mode=types_pb2.SPECULATION_MODE_SSD
        )
        handle = SequenceHandle(nobody, opening, [1, 2, 3], SequenceEvents())
        handle.move(connections[0])
        pairing = threading.Thread(target=_pairing, args=(handle, connections, rng))
        pairing.start()
        _engine(handle, rng.randint(0, 3))
        pairing.join(60)
        assert not pairing.is_alive()
        assert not _still_open(nobody.outbox)
