"""Messages to speculators on their way from engine threads to the event loop."""

from __future__ import annotations

import threading

from specpool.speculation.connection import Connection
from specpool.v1 import speculator_pb2

Request = speculator_pb2.SpeculateRequest


class _Waiting:
    """Messages for one connection. Their order about one sequence is kept; outcomes of all travel in one message."""

    def __init__(self) -> None:
        self.sealed: list[Request] = []
        self.outcomes: list[speculator_pb2.Outcome] = []
        self.after: list[Request] = []
        self.named: set[str] = set()
        """Ids of sequences that something was said about since `sealed`."""

    def seal(self) -> list[Request]:
        if self.outcomes:
            self.sealed.append(Request(outcomes=speculator_pb2.Outcomes(outcomes=self.outcomes)))
        self.sealed += self.after
        self.outcomes, self.after, self.named = [], [], set()
        return self.sealed


class Outbox:
    """The messages that wait to be sent, by connection. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[Connection, _Waiting] = {}

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to take."""
        return not self._waiting

    def outcome(self, connection: Connection, sequence_id: str, outcome: speculator_pb2.Outcome) -> None:
        """Add an outcome to the others of the step; it comes after all that was said about its sequence before."""
        with self._lock:
            waiting = self._waiting.get(connection) or self._of(connection)
            if sequence_id in waiting.named:
                waiting.seal()
            waiting.named.add(sequence_id)
            waiting.outcomes.append(outcome)

    def send(self, connection: Connection, sequence_id: str, request: Request) -> None:
        """Add a message; it comes after all that was said about the sequence before."""
        with self._lock:
            waiting = self._of(connection)
            waiting.after.append(request)
            waiting.named.add(sequence_id)

    def take(self) -> list[tuple[Connection, list[Request]]]:
        """Take everything out: the messages of each connection, in order."""
        with self._lock:
            taken, self._waiting = self._waiting, {}
        return [(connection, waiting.seal()) for connection, waiting in taken.items()]

    def _of(self, connection: Connection) -> _Waiting:
        waiting = self._waiting.get(connection)
        if waiting is None:
            waiting = self._waiting[connection] = _Waiting()
        return waiting
