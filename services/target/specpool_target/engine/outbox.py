"""What the target's engine tells streams and speculators, in one hand-over per flush."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from specpool.v1 import speculator_pb2
from specpool_engine.runtime.outbox import Outbox
from specpool_target.engine.sequence import SequenceUpdate
from specpool_target.engine.streams import Streams
from specpool_target.links.link import Request, SpeculatorLink


@dataclass(frozen=True, slots=True)
class ToSpeculator:
    """Messages for the stream of one connection."""

    link: SpeculatorLink
    epoch: int
    requests: list[Request]


class TargetOutbox:
    """Used on the engine thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, streams: Streams) -> None:
        self._streams = streams
        self._to_loop = Outbox(loop, self._deliver)
        self._requests: dict[tuple[SpeculatorLink, int], list[Request]] = {}
        self._outcomes: dict[tuple[SpeculatorLink, int], speculator_pb2.Outcomes] = {}
        self._updates: list[tuple[str, SequenceUpdate]] = []

    def send(self, link: SpeculatorLink, epoch: int, request: Request) -> None:
        """A message for one speculator, after this flush's outcomes."""
        self._requests.setdefault((link, epoch), []).append(request)

    def outcome(self, link: SpeculatorLink, epoch: int, outcome: speculator_pb2.Outcome) -> None:
        """All outcomes of a step travel in one message."""
        self._outcomes.setdefault((link, epoch), speculator_pb2.Outcomes()).outcomes.append(outcome)

    def emit(self, sequence_id: str, update: SequenceUpdate) -> None:
        """For the stream of a sequence."""
        self._updates.append((sequence_id, update))

    def flush(self) -> None:
        """Hand everything over, to speculators first."""
        for (link, epoch), outcomes in self._outcomes.items():
            requests = [Request(outcomes=outcomes), *self._requests.pop((link, epoch), ())]
            self._to_loop.put(ToSpeculator(link, epoch, requests))
        for (link, epoch), requests in self._requests.items():
            self._to_loop.put(ToSpeculator(link, epoch, requests))
        for update in self._updates:
            self._to_loop.put(update)
        self._outcomes, self._requests, self._updates = {}, {}, []
        self._to_loop.flush()

    def _deliver(self, items: list[ToSpeculator | tuple[str, SequenceUpdate]]) -> None:
        for item in items:
            if isinstance(item, ToSpeculator):
                item.link.send(item.epoch, item.requests)
            else:
                self._streams.deliver(*item)
