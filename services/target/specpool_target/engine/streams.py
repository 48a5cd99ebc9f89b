"""Who listens to which sequence: the wire's half of the seam. The engine knows sequences by their ids alone."""

from __future__ import annotations

from collections.abc import Callable

from specpool.errors import SpecPoolError
from specpool_target.engine.sequence import SequenceUpdate

Emit = Callable[[SequenceUpdate], None]


class Streams:
    """The functions that take each sequence's updates. Used from the event loop, but for `open`."""

    def __init__(self) -> None:
        self._emits: dict[str, Emit] = {}

    def open(self, sequence_id: str, emit: Emit) -> None:
        """Have updates of the sequence go to `emit` from now on."""
        self._emits[sequence_id] = emit

    def close(self, sequence_id: str) -> None:
        """Forget who listens to the sequence; whatever still comes is dropped."""
        self._emits.pop(sequence_id, None)

    def deliver(self, sequence_id: str, update: SequenceUpdate) -> None:
        """Pass on an update of the engine; the last one of a sequence closes its stream."""
        emit = self._emits.get(sequence_id)
        if emit is None:
            return
        if update.is_last:
            self.close(sequence_id)
        emit(update)

    def fail(self, error: SpecPoolError) -> None:
        """End every stream with `error`: the engine is lost, whatever it still has of them."""
        emits, self._emits = self._emits, {}
        for emit in emits.values():
            emit(SequenceUpdate(error=error))
