"""A sequence without a network: what its speculator is told, in which order, and what the engine finds."""

from __future__ import annotations

import numpy as np
import pytest

from specpool.algorithm.speculation_cache import LookupKind
from specpool.errors import InvalidArgument
from specpool.speculation import DraftSource, NextDraft
from specpool.v1 import speculator_pb2

from .conftest import GPU, VOCAB, connection, table


def test_a_hit_is_what_the_table_has_and_the_outcome_says_what_is_verified(handle, owner, first, paired):
    handle.take_table(first, table(0, (0, 6, [1]), (0, 7, [8, 9, 10, 11])))
    assert handle.next(0, 7) == NextDraft(LookupKind.HIT, (8, 9, 10, 11), 1)
    handle.started((8, 9, 10, 11))
    handle.take_table(first, table(1, (2, 5, [3])))
    assert handle.next(2, 5) == NextDraft(LookupKind.PARTIAL, (3,), 0)
    handle.started([3, 4], DraftSource.SPECULATOR)
    (_, opened), *outcomes = owner.told()
    assert (list(opened.token_ids), opened.round, opened.num_prompt_tokens) == ([1, 2], 0, 2)
    assert [
        (o.round, o.num_accepted, o.bonus_token, list(o.draft_tokens)) for _, m in outcomes for o in m.outcomes
    ] == [
        (0, 0, 7, [8, 9, 10, 11]),
        (1, 2, 5, [3, 4]),
    ]
    assert [speculator.address for speculator in paired] == [GPU]


def test_less_can_be_used_than_the_table_has(handle, first):
    handle.take_table(first, table(0, (0, 7, [8, 9, 10, 11])))
    assert handle.next(0, 7, lookahead=2) == NextDraft(LookupKind.HIT, (8, 9), 0)
    handle.take_table(first, table(1, (0, 7, [8, 9])))
    assert handle.next(0, 7, lookahead=0).tokens == ()


def test_tokens_that_the_model_does_not_have_are_never_proposed(handle, first):
    handle.take_table(first, table(0, (0, 7, [8, VOCAB, 10])))
    assert handle.next(0, 7).tokens == (8,)


def test_only_tables_of_the_running_round_are_kept(handle, first):
    handle.take_table(first, table(5, (0, 7, [8])))
    handle.take_table(connection(), table(0, (0, 7, [8])))
    assert handle.next(0, 7).kind is LookupKind.LATE
    handle.take_table(first, table(0, (0, 7, [8])))
    assert handle.next(0, 7).kind is LookupKind.LATE


def test_without_a_speculator_nothing_is_looked_up_and_the_next_one_hears_everything(handle, owner, paired):
    assert handle.next(0, 7) == NextDraft()
    handle.started((8, 9), DraftSource.BACKUP)
    assert handle.next(1, 5) == NextDraft()
    assert owner.told() == []
    handle.move(connection())
    assert owner.told() == []  # what round 2 verifies is not decided
    handle.started((6,), DraftSource.BACKUP)
    ((_, opened),) = owner.told()
    assert (list(opened.token_ids), opened.round, list(opened.draft_tokens)) == ([1, 2, 7, 8, 5], 2, [6])
    assert [speculator.address for speculator in paired] == [GPU]


def test_a_round_that_is_not_started_verifies_nothing(handle, owner, first):
    handle.next(0, 7)
    handle.next(0, 8)
    handle.started()
    assert owner.kinds() == ["open_sequence", "outcomes", "outcomes"]
    with pytest.raises(InvalidArgument, match="round 2 has started already"):
        handle.started()
    with pytest.raises(InvalidArgument, match="1 tokens accepted of 0"):
        handle.next(1, 8)


def test_committed_tokens_say_how_many_were_accepted(handle, first):
    handle.committed([7])
    handle.started((8, 9))
    handle.committed([8, 4])
    with pytest.raises(InvalidArgument, match="does not begin with a part of"):
        handle.committed([8, 4])
    with pytest.raises(InvalidArgument, match="at least one token"):
        handle.committed([])
    handle.started()
    handle.move(connection())
    assert list(handle._tokens) == [1, 2, 7, 8, 4]


def test_tokens_may_come_in_arrays(handle, owner, first):
    handle.committed(np.array([7]))
    handle.started(np.array([8, 9]))
    handle.committed(np.array([8, 4]))
    handle.started(np.array([3]))
    _, (_, told), (_, last) = owner.told()
    assert [list(m.outcomes[0].draft_tokens) for m in (told, last)] == [[8, 9], [3]]


def test_a_move_closes_here_and_opens_there_and_tables_from_here_are_not_used(handle, owner, first, paired):
    second = connection()
    handle.take_table(first, table(0, (0, 7, [8])))
    handle.move(second)
    handle.take_table(first, table(0, (0, 7, [8])))
    assert owner.kinds() == ["open_sequence", "close_sequence", "open_sequence"]
    assert handle.next(0, 7).kind is LookupKind.LATE
    assert not handle.lost(first)
    assert handle.lost(second)
    assert not handle.is_placed
    assert paired == [first, second, None]
    assert (first.num_placed, second.num_placed) == (0, 0)


def test_the_last_that_is_told_of_a_place_is_true(handle, owner, paired):
    first = connection()
    owner.hurry = lambda: handle.lost(first)  # the loop is faster than the engine's thread
    handle.move(first)
    assert not handle.is_placed
    assert paired[-1] is None


def test_a_stream_that_ended_in_this_moment_is_no_place(handle, owner):
    gone = connection()
    gone.is_open = False
    handle.move(gone)
    assert owner.to_place == [handle]
    assert gone.num_placed == 0


def test_a_speculator_that_lost_it_is_told_everything_again_once_per_round(handle, owner, first):
    handle.next(0, 7)
    handle.started((8,))
    handle.reopen(first)
    handle.reopen(first)
    assert owner.kinds() == ["open_sequence", "outcomes", "close_sequence", "open_sequence"]
    handle.next(1, 9)
    handle.reopen(first)  # before it is known what the round verifies
    assert owner.kinds() == ["close_sequence"]
    handle.started((3,))
    (_, opened), *rest = owner.told()
    assert (list(opened.token_ids), list(opened.draft_tokens), rest) == ([1, 2, 7, 8, 9], [3], [])


def test_what_ends_before_it_could_be_opened_again_is_not_left_behind(handle, owner, first):
    handle.next(0, 7)
    handle.reopen(first)
    handle.close()
    assert owner.kinds() == ["open_sequence", "close_sequence"]


def test_no_speculator_holds_it_while_it_is_paused(handle, owner, first):
    handle.pause()
    handle.next(0, 7)
    handle.started((8,), DraftSource.BACKUP)
    handle.move(connection())
    assert owner.kinds() == ["open_sequence", "close_sequence"]
    handle.resume()
    handle.resume()
    assert owner.to_place == [handle]
    handle.move(connection())
    ((_, opened),) = owner.told()
    assert (list(opened.token_ids), opened.round, list(opened.draft_tokens)) == ([1, 2, 7], 1, [8])


def test_nothing_follows_a_close(handle, owner, first):
    handle.close()
    handle.close()
    handle.next(0, 7)
    handle.started()
    handle.resume()
    handle.move(connection())
    assert owner.kinds() == ["open_sequence", "close_sequence"]


def test_what_was_opened_again_before_the_refusal_came_is_not_left_behind(handle, owner, first):
    handle.pause()
    handle.resume()
    handle.move(first)
    handle.lost(first)  # the refusal of the first opening
    assert owner.kinds() == ["open_sequence", "close_sequence", "open_sequence", "close_sequence"]


def test_nothing_is_said_on_a_stream_that_has_ended(handle, owner, first):
    owner.told()
    first.is_open = False
    assert handle.lost(first)
    assert owner.told() == []


def test_outcomes_of_a_step_travel_together_but_never_before_what_was_said_earlier(owner):
    one, two = connection(), connection()
    outcome = speculator_pb2.Outcome
    request = speculator_pb2.SpeculateRequest
    outbox = owner.outbox
    outbox.outcome(one, "a", outcome(sequence_id="a", round=1))
    outbox.send(one, "a", request(speculate_now=speculator_pb2.SpeculateNow(sequence_id="a")))
    outbox.outcome(one, "b", outcome(sequence_id="b", round=1))
    outbox.outcome(two, "c", outcome(sequence_id="c", round=1))
    outbox.outcome(one, "a", outcome(sequence_id="a", round=2))
    taken = {connection: [r.WhichOneof("message") for r in requests] for connection, requests in outbox.take()}
    assert taken == {one: ["outcomes", "speculate_now", "outcomes"], two: ["outcomes"]}
    assert outbox.is_empty
