"""Which sequence is where, and which place is the best for one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from specpool.speculation.choice import Candidate, choose
from specpool.speculation.connection import Connection, PlacedSequence
from specpool.speculation.identity import PoolIdentity
from specpool.speculation.members import Member


class Placement:
    """The places of all sequences. Changed by the pool's event loop; `place` may be called from any thread."""

    def __init__(self, identity: PoolIdentity, on_move: Callable[[str], None]) -> None:
        """`on_move` is told why, each time a sequence changes its place."""
        self.members: dict[str, Member] = {}
        """The speculators, by address."""
        self.unplaced: dict[str, PlacedSequence] = {}
        """Sequences without a speculator, by id."""
        self._identity = identity
        self._on_move = on_move

    def place(self, sequence: PlacedSequence) -> bool:
        """Give a sequence to the best speculator that is connected; False if there is none."""
        now_s = time.monotonic()
        silent = [member for member in list(self.members.values()) if member.takes_sequences(now_s)]
        best = self.best_for(sequence, self.usable(now_s)) or self.best_for(sequence, silent)
        return self.put(sequence, best)

    def put(self, sequence: PlacedSequence, member: Member | None) -> bool:
        """Give a sequence to this speculator; False if that is none, or has just been lost."""
        connection = None if member is None else member.connection
        if connection is not None:
            sequence.move(connection)
        return connection is not None

    def move(self, sequence: PlacedSequence, member: Member | None, reason: str) -> bool:
        """Give a sequence that has a place to another speculator; False if that is none, or has just been lost."""
        has_moved = self.put(sequence, member)
        if has_moved:
            self._on_move(reason)
        return has_moved

    def lost(self, sequence: PlacedSequence, connection: Connection, reason: str) -> None:
        """Take a sequence from a connection that has ended, or does not have it."""
        if sequence.lost(connection):
            self._on_move(reason)
            self.unplaced[sequence.id] = sequence

    def release(self, sequence: PlacedSequence) -> None:
        """Take a sequence from its speculator without giving it another."""
        sequence.move(None)
        self.unplaced[sequence.id] = sequence

    def usable(self, now_s: float) -> list[Member]:
        """The speculators that take sequences and answer."""
        members = list(self.members.values())
        return [member for member in members if member.takes_sequences(now_s) and not member.is_silent(now_s)]

    def best_for(self, sequence: PlacedSequence, members: Iterable[Member]) -> Member | None:
        """The best of these speculators that takes the sequence."""
        now_s = time.monotonic()
        return self.choose(m for m in members if m.takes_sequences(now_s) and suits(m, sequence, now_s))

    def choose(self, members: Iterable[Member]) -> Member | None:
        """The best of these speculators for another sequence."""
        by_address = {member.address: member for member in members}
        chosen = choose([self.candidate(member) for member in by_address.values()], self._identity.peer.id)
        return None if chosen is None else by_address[chosen.address]

    def candidate(self, member: Member) -> Candidate:
        """The speculator as the choice of a place sees it."""
        return member.candidate(self._identity.labels)

    def is_wanted(self, member: Member) -> bool:
        """Whether a sequence that has no place might get one there."""
        now_s = time.monotonic()
        return any(suits(member, sequence, now_s) for sequence in self.unplaced.values())


def suits(member: Member, sequence: PlacedSequence, now_s: float) -> bool:
    """Whether the sequence may be tried there: short enough, and not refused lately."""
    return sequence.avoided.get(member.address, 0.0) <= now_s and member.has_context_for(sequence.num_tokens)
