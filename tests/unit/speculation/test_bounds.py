"""However much a speculator sends about a round, what is kept of it and the time that it takes are bounded."""

from __future__ import annotations

import time

from specpool.algorithm.speculation_cache import LookupKind
from specpool.speculation.inbox import SpeculationInbox, read_table
from specpool.v1 import speculator_pb2


def table(first: int, num_entries: int, num_tokens: int = 1) -> speculator_pb2.Table:
    return speculator_pb2.Table(
        sequence_id="s",
        round=1,
        entries=[
            speculator_pb2.TableEntry(num_accepted=0, bonus_token=first + i, draft_tokens=[7] * num_tokens)
            for i in range(num_entries)
        ],
    )


def test_a_table_beyond_all_measure_is_none() -> None:
    assert len(read_table(table(0, 4096))) == 4096
    assert read_table(table(0, 5000)) == {}
    assert read_table(table(0, 2, num_tokens=1000)) == {}


def test_guesses_of_a_round_are_bounded_and_those_that_came_first_still_grow() -> None:
    inbox = SpeculationInbox(lookahead=4)
    for first in range(0, 100_000, 1000):
        inbox.add_table(1, read_table(table(first, 1000)))
    inbox.add_table(1, read_table(table(5, 1, num_tokens=4)))
    started_s = time.process_time()
    found = inbox.lookup(1, 0, 5, lookahead=4)
    assert time.process_time() - started_s < 0.1
    assert (found.kind, found.tokens, found.rank) == (LookupKind.HIT, (7, 7, 7, 7), 5)
    for first in range(0, 3000, 1000):
        inbox.add_table(2, read_table(table(first, 1000)))
    assert inbox.lookup(2, 0, 2500, lookahead=4).kind is LookupKind.MISS
    inbox.add_table(3, read_table(table(2500, 1)))
    assert inbox.lookup(3, 0, 2500, lookahead=4).kind is LookupKind.PARTIAL
