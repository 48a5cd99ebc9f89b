"""What the target's engine tells streams and speculators, in one hand-over per flush."""

from __future__ import annotations

import asyncio
from typing import Final

from specpool.speculation import SpeculationPool
from specpool_engine.runtime.outbox import Outbox
from specpool_target.engine.sequence import SequenceUpdate
from specpool_target.engine.streams import Streams

_Update = tuple[str, SequenceUpdate]
_TO_SPECULATORS: Final = None


class TargetOutbox:
    """Collects what one step has to say. Used on the engine thread; the pool must work on `loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, streams: Streams, pool: SpeculationPool) -> None:
        self._streams = streams
        self._pool = pool
        self._to_loop: Outbox[_Update | None] = Outbox(loop, self._deliver)
        self._updates: list[_Update] = []

    def emit(self, sequence_id: str, update: SequenceUpdate) -> None:
        """Put an update for the stream of a sequence."""
        self._updates.append((sequence_id, update))

    def flush(self) -> None:
        """Hand everything over, to speculators first."""
        if not self._pool.outbox.is_empty:
            self._to_loop.put(_TO_SPECULATORS)
        for update in self._updates:
            self._to_loop.put(update)
        self._updates = []
        self._to_loop.flush()

    def _deliver(self, items: list[_Update | None]) -> None:
        for item in items:
            if item is None:
                self._pool.deliver()
            else:
                self._streams.deliver(*item)
