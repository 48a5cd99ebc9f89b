"""The speculation cache of one sequence: guessed verification outcomes and the tokens drafted after each.

Tables arrive while the round they are about is being verified, and grow deeper as they are pushed again.
Looking up an outcome ends its round: what arrives for it later is stale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

Outcome = tuple[int, int]
"""A verification outcome (accepted length k, bonus token t*)."""


class LookupKind(StrEnum):
    """What the cache had for an outcome."""

    HIT = "hit"
    """The outcome's branch is as deep as the lookahead."""
    PARTIAL = "partial"
    """The outcome's branch has some tokens, fewer than the lookahead."""
    LATE = "late"
    """Nothing usable had arrived: no table of this round, or the outcome without a token yet."""
    MISS = "miss"
    """The outcome was not guessed."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """What a lookup found, and the tokens if there are any."""

    kind: LookupKind
    tokens: tuple[int, ...] = ()
    """Draft tokens to verify next; empty when late or missed."""


class SpeculationCache:
    """The tables of one sequence, by round."""

    def __init__(self, lookahead: int) -> None:
        self._lookahead = lookahead
        self._tables: dict[int, dict[Outcome, tuple[int, ...]]] = {}
        self._first_live_round = 0
        self.num_stale = 0
        """Number of tables that arrived after their round's lookup."""

    def update(self, round_: int, entries: Mapping[Outcome, Sequence[int]]) -> None:
        """Merge a pushed table; a branch only ever grows."""
        if round_ < self._first_live_round:
            self.num_stale += 1
            return
        table = self._tables.setdefault(round_, {})
        for outcome, tokens in entries.items():
            if len(tokens) >= len(table.get(outcome, ())):
                table[outcome] = tuple(tokens)

    def lookup(self, round_: int, num_accepted: int, bonus_token: int, *, lookahead: int | None = None) -> Lookup:
        """The tokens drafted for the outcome of ``round_``, at most ``lookahead``; ends the round."""
        lookahead = self._lookahead if lookahead is None else lookahead
        table = self._tables.get(round_)
        self._first_live_round = max(self._first_live_round, round_ + 1)
        self._tables = {r: t for r, t in self._tables.items() if r >= self._first_live_round}
        if table is None:
            return Lookup(LookupKind.LATE)
        tokens = table.get((num_accepted, bonus_token))
        if tokens is None:
            return Lookup(LookupKind.MISS)
        tokens = tokens[:lookahead]
        if not tokens:
            return Lookup(LookupKind.LATE)
        return Lookup(LookupKind.HIT if len(tokens) >= lookahead else LookupKind.PARTIAL, tokens)

    def num_guesses(self, round_: int) -> int:
        """Number of outcomes of ``round_`` that have arrived."""
        return len(self._tables.get(round_, ()))

    def clear(self) -> None:
        """Forget all tables (the speculator was lost); rounds stay ended."""
        self._tables.clear()
