"""What the engine thread hands to the event loop, in one call per flush."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from specpool.v1 import speculator_pb2
from specpool_target.engine.sequence import SequenceUpdate, TargetSequence
from specpool_target.links.link import Request, SpeculatorLink

_Stream = tuple[SpeculatorLink, int]


class Outbox:
    """Collects messages to speculators and updates of streams; waking the loop is the costly part."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._requests: dict[_Stream, list[Request]] = {}
        self._outcomes: dict[_Stream, speculator_pb2.Outcomes] = {}
        self._updates: list[Callable[[], None]] = []

    def send(self, link: SpeculatorLink, epoch: int, request: Request) -> None:
        """A message for one speculator, after this flush's outcomes."""
        self._requests.setdefault((link, epoch), []).append(request)

    def outcome(self, link: SpeculatorLink, epoch: int, outcome: speculator_pb2.Outcome) -> None:
        """All outcomes of a step travel in one message."""
        self._outcomes.setdefault((link, epoch), speculator_pb2.Outcomes()).outcomes.append(outcome)

    def emit(self, sequence: TargetSequence, update: SequenceUpdate) -> None:
        """For the stream of a sequence."""
        self._updates.append(partial(sequence.emit, update))

    def flush(self) -> None:
        """Hand everything over."""
        deliveries: list[Callable[[], None]] = []
        for (link, epoch), outcomes in self._outcomes.items():
            requests = [Request(outcomes=outcomes), *self._requests.pop((link, epoch), ())]
            deliveries.append(partial(link.send, epoch, requests))
        deliveries += [partial(link.send, epoch, requests) for (link, epoch), requests in self._requests.items()]
        deliveries += self._updates
        self._outcomes, self._requests, self._updates = {}, {}, []
        if deliveries:
            self.call(partial(_run_all, deliveries))

    def call(self, callback: Callable[[], None]) -> None:
        """Run on the event loop."""
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            if not self._loop.is_closed():  # nobody listens any more
                raise


def _run_all(callbacks: list[Callable[[], None]]) -> None:
    for callback in callbacks:
        callback()
