"""Whom a handle talks to: the pool below it, and the engine above."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from specpool.speculation.connection import Connection, PlacedSequence
from specpool.speculation.outbox import Outbox


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceEvents:
    """What an engine is told of a sequence. Called on any thread, with no lock held; must return at once."""

    on_paired: Callable[[Connection | None], None] = lambda connection: None
    """Called when the sequence has another speculator, or none."""
    on_distributions: Callable[[], None] = lambda: None
    """Called when draft distributions have arrived."""


class HandleOwner(Protocol):
    """The pool, as a handle sees it; callable on any thread."""

    outbox: Outbox
    vocab_size: int

    def reported(self) -> None:
        """Note that the outbox has something which may wait for the end of the step."""

    def hurry(self) -> None:
        """Note that the outbox has something which may not wait."""

    def place(self, handle: PlacedSequence) -> None:
        """Give a sequence that needs one a speculator."""

    def forget(self, handle: PlacedSequence) -> None:
        """Forget a sequence that is closed."""
