"""A sequence without a network: what its speculator is told, in which order, and what the engine finds."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from specpool.algorithm.speculation_cache import LookupKind
from specpool.errors import InvalidArgument
from specpool.speculation import DraftSource, NextDraft, SequenceEvents, SequenceHandle, worth_waiting
from specpool.speculation.connection import Connection
from specpool.speculation.outbox import Outbox
from specpool.v1 import speculator_pb2, types_pb2

LOOKAHEAD = 4
GPU, VOCAB = "127.0.0.1:1", 100


class Listener:
    """Of connections that nobody serves."""

    def going_away(self, connection, reason): ...
    def refused(self, connection, refusal): ...
    def transport_changed(self, connection): ...
    def stale_message(self): ...


class Owner:
    """A pool that has one connection at a time."""

    def __init__(self):
        self.outbox, self.vocab_size, self.to_place, self.num_hurries = Outbox(), VOCAB, [], 0

    def reported(self): ...

    def hurry(self):
        self.num_hurries += 1

    def place(self, handle):
        self.to_place.append(handle)

    def forget(self, handle): ...

    def told(self):
        """What was said since, to anybody."""
        return [
            (request.WhichOneof("message"), getattr(request, request.WhichOneof("message")))
            for _, requests in self.outbox.take()
            for request in requests
        ]

    def kinds(self):
        return [kind for kind, _ in self.told()]


def connection(**ack):
    return Connection(GPU, None, speculator_pb2.HelloAck(max_lookahead=4, **ack), round_trip_s=0.0, listener=Listener())


@pytest.fixture
def owner():
    return Owner()


@pytest.fixture
def paired():
    return []


@pytest.fixture
def handle(owner, paired):
    opening = speculator_pb2.OpenSequence(
        sequence_id="a", max_lookahead=LOOKAHEAD, mode=types_pb2.SPECULATION_MODE_SSD, num_prompt_tokens=2
    )
    return SequenceHandle(owner, opening, [1, 2], SequenceEvents(on_paired=paired.append))


@pytest.fixture
def first(handle):
    """The connection on which the sequence is."""
    first = connection()
    handle.move(first)
    return first


def table(round_, *entries):
    table = speculator_pb2.Table(sequence_id="a", round=round_)
    for num_accepted, bonus_token, tokens in entries:
        table.entries.add(num_accepted=num_accepted, bonus_token=bonus_token, draft_tokens=tokens)
    return table


def reply(round_, tokens):
    return speculator_pb2.Speculation(sequence_id="a", round=round_, draft_tokens=tokens)


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


def test_a_draft_is_requested_and_the_round_starts_with_the_answer(handle, owner, first):
    answers = []
    assert not handle.request(4, 0.1, answers.append)  # the round runs
    handle.next(0, 7)
    assert handle.request(4, 0.1, answers.append)
    assert not handle.request(4, 0.1, answers.append)
    handle.take_speculation(first, reply(5, [1]))
    assert handle.is_waiting
    handle.take_speculation(first, reply(0, [8, 9, VOCAB]))
    handle.take_speculation(first, reply(0, [1]))
    assert answers == [(8, 9)]
    handle.started(answers[0])
    told = owner.told()
    assert [kind for kind, _ in told] == ["open_sequence", "outcomes", "speculate_now", "start_round"]
    assert told[1][1].outcomes[0].awaits_speculation
    assert (told[3][1].round, list(told[3][1].draft_tokens)) == (1, [8, 9])


def test_nobody_is_called_after_the_round_has_started(handle, first):
    answers = []
    handle.next(0, 7)
    handle.request(4, 0.1, answers.append)
    handle.started((), DraftSource.NONE)
    handle.take_speculation(first, reply(0, [8]))
    assert answers == []


@pytest.mark.parametrize("loss", ["lost", "move", "reopen", "pause", "close"])
def test_whoever_waits_hears_at_once_when_the_speculator_is_gone(handle, owner, first, loss):
    answers = []
    handle.next(0, 7)
    handle.request(4, 60.0, answers.append)
    owner.told()
    match loss:
        case "lost" | "reopen":
            getattr(handle, loss)(first)
        case "move":
            handle.move(None)
        case _:
            getattr(handle, loss)()
    assert answers == [()]
    handle.started((3,), DraftSource.BACKUP)
    assert owner.kinds() == ["close_sequence", *["open_sequence"] * (loss == "reopen")]


def test_waiting_is_bounded_and_costs_trust(handle, first):
    assert first.trust.may_wait_after_miss()
    handle.next(0, 7)
    handle.request(4, 0.01)
    assert handle.wait(0.02) == ()
    assert not first.trust.may_wait()
    handle.started()
    handle.next(0, 7)
    assert handle.request(4, 60.0)
    threading.Timer(0.05, lambda: handle.take_speculation(first, reply(1, [8]))).start()
    assert handle.wait(60.0) == (8,)


def test_nobody_waits_for_what_was_not_requested(handle, first):
    handle.next(0, 7)
    handle.request(4, 0.01)
    handle.wait(0.02)
    handle.started()
    handle.next(0, 7)
    started_s = time.monotonic()
    assert handle.wait(60.0) == ()
    assert time.monotonic() - started_s < 30


def test_tokens_may_come_in_arrays(handle, owner, first):
    handle.committed(np.array([7]))
    handle.started(np.array([8, 9]))
    handle.committed(np.array([8, 4]))
    handle.started(np.array([3]))
    _, (_, told), (_, last) = owner.told()
    assert [list(m.outcomes[0].draft_tokens) for m in (told, last)] == [[8, 9], [3]]


def test_a_wait_is_worth_it_if_its_draft_comes_in_half_a_round(handle, first):
    handle.next(0, 7)
    assert worth_waiting(handle, 4, round_s=1.0) == 0  # nothing reported yet
    first.measured.draft_step_s = 0.1
    assert [worth_waiting(handle, 4, round_s=round_s) for round_s in (0.1, 0.21, 0.61, 10.0)] == [0, 1, 3, 4]
    first.trust.timed_out()
    assert worth_waiting(handle, 4, round_s=10.0) == 0
    handle.move(None)
    assert worth_waiting(handle, 4, round_s=10.0) == 0


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


def test_distributions_are_of_the_running_round(handle, first):
    handle.next(0, 7)
    handle.started((8,))
    handle.add_distributions(first, 0, "old")
    handle.add_distributions(first, 2, "early")
    assert handle.awaits_distributions()
    handle.add_distributions(first, 1, "right")
    assert not handle.awaits_distributions()
    assert handle.take_distributions() == "right"
    assert handle.take_distributions() is None


@pytest.mark.parametrize("gone", ["move", "reopen"])
def test_nobody_sends_the_distributions_of_a_draft_that_came_from_elsewhere(handle, first, gone):
    handle.next(0, 7)
    handle.started((8,))
    getattr(handle, gone)(first if gone == "reopen" else connection())
    assert not handle.awaits_distributions()
    handle.next(0, 7)
    handle.started((8,), DraftSource.BACKUP)
    assert not handle.awaits_distributions()
    handle.next(0, 7)
    handle.started((8,))
    assert handle.awaits_distributions()


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
