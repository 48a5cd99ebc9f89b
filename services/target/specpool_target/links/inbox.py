"""What a speculator sent about one sequence: tables, and distributions of draft tokens."""

from __future__ import annotations

import threading

from specpool.algorithm.speculation_cache import Lookup, SpeculationCache
from specpool.v1 import speculator_pb2
from specpool_target.verify.arrived_distributions import ArrivedDistributions

Distributions = speculator_pb2.DraftDistributions | ArrivedDistributions
"""Sparse ones, or what came through a process group."""


class SpeculationInbox:
    """Written by the event loop, read by the engine thread."""

    def __init__(self, lookahead: int) -> None:
        self._cache = SpeculationCache(lookahead)
        self._guesses: dict[int, dict[int, list[int]]] = {}
        self._distributions: dict[int, Distributions] = {}
        self._taken_round = -1
        self._lock = threading.Lock()

    def add_table(self, table: speculator_pb2.Table) -> None:
        """A pushed table."""
        entries = {(e.num_accepted, e.bonus_token): tuple(e.draft_tokens) for e in table.entries}
        with self._lock:
            self._cache.update(table.round, entries)
            guesses = self._guesses.setdefault(table.round, {})
            for num_accepted, bonus_token in entries:
                tokens = guesses.setdefault(num_accepted, [])
                if bonus_token not in tokens:
                    tokens.append(bonus_token)

    def lookup(self, round_: int, num_accepted: int, bonus_token: int, *, lookahead: int) -> tuple[Lookup, int | None]:
        """The lookup, and the rank of the bonus token among the guesses of its position."""
        with self._lock:
            lookup = self._cache.lookup(round_, num_accepted, bonus_token, lookahead=lookahead)
            guesses = self._guesses.get(round_, {}).get(num_accepted, [])
            self._guesses = {r: g for r, g in self._guesses.items() if r > round_}
        return lookup, guesses.index(bonus_token) if bonus_token in guesses else None

    def add_distributions(self, round_: int, distributions: Distributions) -> None:
        """For the round that verifies the tokens they name; dropped if that is over."""
        with self._lock:
            if round_ > self._taken_round:
                self._distributions[round_] = distributions

    def has_distributions(self, round_: int) -> bool:
        """Whether those of `round_` are here."""
        return round_ in self._distributions

    def take_distributions(self, round_: int) -> Distributions | None:
        """Those of `round_`, if they are here; later ones for it, and all before, are dropped."""
        with self._lock:
            self._taken_round = round_
            taken = self._distributions.get(round_)
            self._distributions = {r: d for r, d in self._distributions.items() if r > round_}
        return taken

    def clear(self) -> None:
        """The speculator lost its state."""
        with self._lock:
            self._cache.clear()
            self._guesses.clear()
            self._distributions.clear()
