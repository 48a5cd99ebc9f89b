"""Whom a handle talks to: the pool below it, and the engine above."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from specpool.speculation.connection import Connection, PlacedSequence
from specpool.speculation.outbox import Outbox


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceEvents:
    """Called on whatever thread it happens, with no lock held; must return at once."""

    on_paired: Callable[[Connection | None], None] = lambda connection: None
    """The sequence has another speculator, or none."""
    on_distributions: Callable[[], None] = lambda: None
    """Draft distributions have arrived."""


class HandleOwner(Protocol):
    """The pool, as a handle sees it; any thread."""

    outbox: Outbox
    vocab_size: int

    def reported(self) -> None:
        """There is something in the outbox that may wait for the end of the step."""

    def hurry(self) -> None:
        """There is something in the outbox that may not."""

    def place(self, handle: PlacedSequence) -> None:
        """It needs a speculator."""

    def forget(self, handle: PlacedSequence) -> None:
        """It is closed."""
