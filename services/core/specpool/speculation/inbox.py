"""What a speculator sent about one sequence: tables, and distributions of draft tokens."""

from __future__ import annotations

from typing import Final

from specpool.algorithm.speculation_cache import SpeculationCache
from specpool.rpc.checks import MAX_DRAFT_TOKENS
from specpool.speculation.draft import NextDraft
from specpool.v1 import speculator_pb2

Entries = dict[tuple[int, int], tuple[int, ...]]
_MAX_ENTRIES: Final = 4096
"""Most entries of one table; a larger one is no table."""
_MAX_GUESSES: Final = 1024
"""Most guesses of one round; more are not kept, so that looking for one takes little, whatever a speculator sends."""


def read_table(table: speculator_pb2.Table) -> Entries:
    """The draft tokens by guessed outcome (accepted length, bonus token)."""
    entries = table.entries if len(table.entries) <= _MAX_ENTRIES else ()
    return {
        (e.num_accepted, e.bonus_token): tuple(e.draft_tokens)
        for e in entries
        if len(e.draft_tokens) <= MAX_DRAFT_TOKENS
    }


class SpeculationInbox:
    """What one sequence was sent. Not safe against threads: its handle has the lock."""

    def __init__(self, lookahead: int) -> None:
        self._cache = SpeculationCache(lookahead)
        self._guesses: dict[int, list[int]] = {}
        """Bonus tokens guessed for the running round, by accepted length, in the order of their arrival."""
        self._num_guesses = 0
        self._distributions: dict[int, object] = {}
        self._taken_round = self._expected_round = -1

    def add_table(self, round_: int, entries: Entries) -> None:
        """Take in a pushed table of the running round."""
        kept: Entries = {}
        for (num_accepted, bonus_token), tokens in entries.items():
            guesses = self._guesses.get(num_accepted, [])
            if bonus_token not in guesses:
                if self._num_guesses == _MAX_GUESSES:
                    continue
                self._num_guesses += 1
                self._guesses.setdefault(num_accepted, guesses).append(bonus_token)
            kept[num_accepted, bonus_token] = tokens
        self._cache.update(round_, kept)

    def lookup(self, round_: int, num_accepted: int, bonus_token: int, *, lookahead: int) -> NextDraft:
        """What is proposed after this outcome; ends the round."""
        found = self._cache.lookup(round_, num_accepted, bonus_token, lookahead=lookahead)
        guesses = self._guesses.get(num_accepted, [])
        self._guesses, self._num_guesses = {}, 0
        return NextDraft(found.kind, found.tokens, guesses.index(bonus_token) if bonus_token in guesses else None)

    def add_distributions(self, round_: int, distributions: object) -> None:
        """Keep the distributions of the tokens that `round_` verifies; dropped if that is over."""
        if round_ > self._taken_round:
            self._distributions[round_] = distributions

    def expect_distributions(self, round_: int) -> None:
        """Note that the speculator is told that `round_` verifies what it drafted."""
        self._expected_round = round_

    def awaits_distributions(self, round_: int) -> bool:
        """Whether those of `round_` are still to come."""
        return self._expected_round == round_ and round_ not in self._distributions

    def take_distributions(self, round_: int) -> object | None:
        """The distributions of `round_`, if they are here; later ones for it, and all before, are dropped."""
        self._taken_round = round_
        taken = self._distributions.get(round_)
        self._distributions = {r: d for r, d in self._distributions.items() if r > round_}
        return taken

    def clear(self) -> None:
        """Forget everything: the speculator lost its state."""
        self._cache.clear()
        self._guesses, self._num_guesses = {}, 0
        self._distributions.clear()
        self._expected_round = -1
