"""Whether a speculator is silent may be asked by any thread while its messages come in."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import pytest

from specpool.speculation.connection import Connection
from specpool.v1 import speculator_pb2


@dataclass
class Call:
    """A stream whose messages the test gives."""

    messages: list[Any] = field(default_factory=list)

    async def read(self) -> Any:
        return self.messages.pop(0) if self.messages else grpc.aio.EOF


class Listener:
    def stale_message(self) -> None:
        """Nobody asks."""


def connection_that_owes_an_answer(call: Call) -> Connection:
    connection = Connection("127.0.0.1:1", call, speculator_pb2.HelloAck(), round_trip_s=0.0, listener=Listener())  # type: ignore[arg-type]
    connection.attach("a", object())  # type: ignore[arg-type]
    connection.expect_answer()
    return connection


class AnswerComesMeanwhile:
    """Measurements in whose reading the event loop takes an answer in, as it may at any time."""

    num_received = 0

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def draft_step_s(self) -> float:
        with pytest.raises(StopIteration):
            self._connection._read().send(None)
        return 0.0


def test_an_answer_that_comes_while_an_engine_asks_fails_nothing() -> None:
    answer = speculator_pb2.SpeculateResponse(speculation=speculator_pb2.Speculation(sequence_id="b"))
    connection = connection_that_owes_an_answer(Call([answer]))
    connection.measured = AnswerComesMeanwhile(connection)  # type: ignore[assignment]
    connection.is_stalled(time.monotonic())
    assert not connection.is_stalled(time.monotonic() + 3600), "it has answered"


def test_an_answer_owed_for_long_is_silence() -> None:
    connection = connection_that_owes_an_answer(Call())
    assert not connection.is_stalled(time.monotonic())
    assert connection.is_stalled(time.monotonic() + 3600)
