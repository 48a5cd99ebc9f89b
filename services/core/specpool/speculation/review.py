"""One look at all speculators and sequences: connect, leave, place, balance, drop. Belongs to the pool's event loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from specpool.speculation.choice import is_worth_moving
from specpool.speculation.connection import PlacedSequence
from specpool.speculation.members import Member
from specpool.speculation.pairing_settings import PairingSettings
from specpool.speculation.placement import Placement, suits

_OPENINGS_PER_REVIEW: Final = 4
"""Most sequences given at once to a speculator that refused one lately."""
_REMEMBERED_REFUSAL_S: Final = 60.0
_MOVED_AT_ONCE: Final = 8
"""Fraction of a crowded speculator's sequences that move per review: one in so many."""


class Review:
    """A look at everything, which may be taken at any time and as often as one likes."""

    def __init__(
        self,
        placement: Placement,
        settings: PairingSettings,
        fingerprint: str,
        *,
        connect: Callable[[Member], None],
        disconnect: Callable[[Member], None],
        forget: Callable[[Member], None],
    ) -> None:
        """`fingerprint` is that of our tokenizer."""
        self._placement = placement
        self._members = placement.members
        self._settings = settings
        self._fingerprint = fingerprint
        self._connect_to = connect
        self._disconnect = disconnect
        self._forget = forget

    def run(self, now_s: float) -> None:
        """Take one look, and do what it calls for."""
        self._connect(now_s)
        for member in list(self._members.values()):
            self._leave(member, now_s)
        self._place_waiting(now_s)
        for member in self._members.values():
            self._balance(member, now_s)
        self._drop_idle(now_s)

    def _connect(self, now_s: float) -> None:
        """Connect to the best speculator; to the next best while some sequence can use none that is connected."""
        placement = self._placement
        unknown = [m for m in self._members.values() if m.is_worth_connecting(now_s, self._fingerprint)]
        usable, needy = placement.usable(now_s), self._needy(now_s)
        if needy is not None:
            unknown = [member for member in unknown if suits(member, needy, now_s)]
        if not usable or needy is not None:
            usable = []
            if any(member.is_connecting(now_s) for member in self._members.values()):
                return
        reachable = [member for member in unknown if member.is_reachable]
        best = placement.choose(usable + reachable if usable else reachable or unknown)
        if best is not None and best.link is None:
            self._connect_to(best)

    def _needy(self, now_s: float) -> PlacedSequence | None:
        """A sequence that none of the connected speculators takes."""
        usable = self._placement.usable(now_s)
        waiting = (sequence for sequence in self._placement.unplaced.values() if not sequence.is_placed)
        return next((sequence for sequence in waiting if self._placement.best_for(sequence, usable) is None), None)

    def _leave(self, member: Member, now_s: float) -> None:
        """Move sequences away from a speculator that goes, has gone from the directory, or is silent."""
        reason = member.reason_to_leave(now_s)
        if reason is None:
            return
        others = [other for other in self._placement.usable(now_s) if other is not member]
        since_s, placement = member.leaving_since_s, self._placement
        is_overdue = since_s is not None and now_s - since_s > self._settings.longest_leave_s
        for sequence in member.placed():
            has_moved = placement.move(sequence, placement.best_for(sequence, others), reason)
            if not has_moved and is_overdue:
                placement.release(sequence)
        if reason != "silent" and not member.placed():
            self._disconnect(member)
            if not member.is_named:
                self._forget(member)

    def _place_waiting(self, now_s: float) -> None:
        placement, members = self._placement, self._placement.usable(now_s)
        num_openings: Counter[str] = Counter()
        for sequence in list(placement.unplaced.values()):
            member = None if sequence.is_placed else placement.best_for(sequence, members)
            if sequence.is_placed or placement.put(sequence, member):
                placement.unplaced.pop(sequence.id, None)
            if member is not None and now_s < member.refused_until_s + _REMEMBERED_REFUSAL_S:
                # Each opening costs it the reading of a whole sequence, which those that are served must not feel.
                num_openings[member.address] += 1
                if num_openings[member.address] >= _OPENINGS_PER_REVIEW:
                    members.remove(member)

    def _balance(self, member: Member, now_s: float) -> None:
        """Move a few sequences to a place that has been better for long."""
        placement, placed = self._placement, member.placed()
        others = [other for other in placement.usable(now_s) if other is not member]
        other = placement.choose(others) if placed and member.reason_to_leave(now_s) is None else None
        if other is None or not is_worth_moving(placement.candidate(member), placement.candidate(other)):
            member.crowded_since_s = None
            return
        if member.crowded_since_s is None:
            member.crowded_since_s = now_s
        if now_s - member.crowded_since_s < self._settings.crowded_for_s:
            return
        latest_s = now_s - self._settings.shortest_stay_s
        movable = [s for s in placed if s.placed_at_s <= latest_s and suits(other, s, now_s)]
        for sequence in movable[: max(1, len(placed) // _MOVED_AT_ONCE)]:
            placement.move(sequence, other, "crowded")

    def _drop_idle(self, now_s: float) -> None:
        """Close connections and attempts that nobody needs: not the best one, nor the last."""
        best = self._placement.choose(self._placement.usable(now_s))
        for member in self._members.values():
            if member.link is None or member.placed() or best is None or member is best:
                member.idle_since_s = None
            elif member.idle_since_s is None:
                member.idle_since_s = now_s
            elif now_s - member.idle_since_s > self._settings.idle_link_s:
                self._disconnect(member)
