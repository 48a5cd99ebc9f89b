"""What is known of a speculator may be asked by any thread while it comes and goes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from specpool.speculation.members import Member
from specpool.v1 import speculator_pb2, types_pb2


class LostMeanwhile:
    """A link whose connection is lost after it has been looked at."""

    def __init__(self, connection: Any) -> None:
        self._connections = [connection]

    @property
    def connection(self) -> Any:
        return self._connections.pop() if self._connections else None


def test_a_speculator_that_is_lost_while_an_engine_asks_fails_nothing() -> None:
    ack = speculator_pb2.HelloAck(model=types_pb2.ModelInfo(max_context=5))
    connection = SimpleNamespace(
        ack=ack,
        is_open=True,
        num_placed=1,
        is_stalled=lambda now_s: False,
        measured=SimpleNamespace(load=types_pb2.Load(), num_placed=1),
    )
    member = Member("a:1", {})
    for ask in (
        lambda: member.has_context_for(6),
        lambda: member.takes_sequences(0.0),
        lambda: member.is_silent(0.0),
        lambda: member.candidate({}),
        lambda: member.placed(),
    ):
        connection.placed = list
        member.link = LostMeanwhile(connection)  # type: ignore[assignment]
        ask()
    member.link = LostMeanwhile(connection)  # type: ignore[assignment]
    assert not member.has_context_for(6)
