"""A pool and connections that nobody serves: tests say what speculators send, and see what they are told."""

from __future__ import annotations

import pytest

from specpool.speculation import SequenceEvents, SequenceHandle
from specpool.speculation.connection import Connection
from specpool.speculation.outbox import Outbox
from specpool.v1 import speculator_pb2, types_pb2

LOOKAHEAD = 4
GPU, VOCAB = "127.0.0.1:1", 100


class Listener:
    """Of connections that nobody serves."""

    def going_away(self, connection, reason): ...
    def refused(self, connection, refusal): ...
    def transport_changed(self, connection): ...
    def stale_message(self): ...


class Owner:
    """A pool that has one connection at a time."""

    def __init__(self):
        self.outbox, self.vocab_size, self.to_place, self.num_hurries = Outbox(), VOCAB, [], 0

    def reported(self): ...

    def hurry(self):
        self.num_hurries += 1

    def place(self, handle):
        self.to_place.append(handle)

    def forget(self, handle): ...

    def told(self):
        """What was said since, to anybody."""
        return [
            (request.WhichOneof("message"), getattr(request, request.WhichOneof("message")))
            for _, requests in self.outbox.take()
            for request in requests
        ]

    def kinds(self):
        return [kind for kind, _ in self.told()]


def connection(**ack):
    return Connection(GPU, None, speculator_pb2.HelloAck(max_lookahead=4, **ack), round_trip_s=0.0, listener=Listener())


@pytest.fixture
def owner():
    return Owner()


@pytest.fixture
def paired():
    return []


@pytest.fixture
def handle(owner, paired):
    opening = speculator_pb2.OpenSequence(
        sequence_id="a", max_lookahead=LOOKAHEAD, mode=types_pb2.SPECULATION_MODE_SSD, num_prompt_tokens=2
    )
    return SequenceHandle(owner, opening, [1, 2], SequenceEvents(on_paired=paired.append))


@pytest.fixture
def first(handle):
    """The connection on which the sequence is."""
    first = connection()
    handle.move(first)
    return first


def table(round_, *entries):
    table = speculator_pb2.Table(sequence_id="a", round=round_)
    for num_accepted, bonus_token, tokens in entries:
        table.entries.add(num_accepted=num_accepted, bonus_token=bonus_token, draft_tokens=tokens)
    return table


def reply(round_, tokens):
    return speculator_pb2.Speculation(sequence_id="a", round=round_, draft_tokens=tokens)
