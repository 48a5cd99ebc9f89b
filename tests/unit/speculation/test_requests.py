"""What a sequence waits for: drafts that were requested, and draft distributions."""

from __future__ import annotations

import threading
import time

import pytest

from specpool.speculation import DraftSource, worth_waiting

from .conftest import VOCAB, connection, reply


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


def test_a_wait_is_worth_it_if_its_draft_comes_in_half_a_round(handle, first):
    handle.next(0, 7)
    assert worth_waiting(handle, 4, round_s=1.0) == 0  # nothing reported yet
    first.measured.draft_step_s = 0.1
    assert [worth_waiting(handle, 4, round_s=round_s) for round_s in (0.1, 0.21, 0.61, 10.0)] == [0, 1, 3, 4]
    first.trust.timed_out()
    assert worth_waiting(handle, 4, round_s=10.0) == 0
    handle.move(None)
    assert worth_waiting(handle, 4, round_s=10.0) == 0


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
