"""Sequences that are not taken: the target is told why, and those that are served lose nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from specpool.v1 import speculator_pb2, types_pb2

from .conftest import CONNECTION, VOCAB_SIZE, ScriptedTarget, exchange, make_drafter

Open = speculator_pb2.OpenSequence


def _refusal(target: ScriptedTarget) -> Any:
    (refusal,) = target.answers
    assert isinstance(refusal, speculator_pb2.SequenceRefused)
    assert refusal.sequence_id == target.name
    return refusal


def test_more_than_max_sequences_are_refused_and_taken_when_there_is_room(prompt) -> None:
    drafter, _ = make_drafter(max_sequences=2)
    targets = [ScriptedTarget(drafter, prompt, name=name) for name in "abc"]
    exchange(drafter, targets, num_steps=9)
    refusal = _refusal(targets[2])
    assert refusal.reason == speculator_pb2.REFUSAL_REASON_TOO_MANY_SEQUENCES
    assert refusal.message == "2 sequences are held here, and no more are taken"
    assert refusal.retry_after_ms > 0
    assert targets[0].table
    assert targets[1].table
    targets[0].close()
    targets[2].answers.clear()
    targets[2].open()
    exchange(drafter, targets, num_steps=9)
    assert targets[2].table
    assert not targets[2].answers
    assert drafter.held.refusals.counts == {speculator_pb2.REFUSAL_REASON_TOO_MANY_SEQUENCES: 1}


def test_a_refusal_costs_the_sequences_that_are_served_nothing(prompt) -> None:
    """A served sequence gets the same tables in as many steps, however many others ask in vain."""
    tables = []
    for num_others in (0, 50):
        drafter, model = make_drafter(max_sequences=1)
        served = ScriptedTarget(drafter, prompt)
        others = [ScriptedTarget(drafter, [7, *prompt], name=f"o{i}") for i in range(num_others)]
        for _ in range(4):
            exchange(drafter, [served, *others], num_steps=4)
            for other in others:
                other.open()
        tables.append((served.table, model.num_tokens))
    assert tables[0][0]
    assert tables[0] == tables[1]


def test_what_is_still_said_of_a_refused_sequence_is_ignored(prompt) -> None:
    drafter, _ = make_drafter(max_sequences=1)
    targets = [ScriptedTarget(drafter, prompt, name=name) for name in "ab"]
    targets[1].outcome(0, 1, awaits=True)
    targets[1].speculate_now(3)
    targets[1].start_round([2])
    exchange(drafter, targets, num_steps=9)
    assert _refusal(targets[1])
    targets[1].close()
    targets[1].outcome(0, 1)  # as after any close: it is asked for again
    exchange(drafter, targets, num_steps=9)
    assert targets[1].answers[1].DESCRIPTOR.name == "Resync"


def test_a_sequence_that_does_not_fit_into_the_memory_is_refused(prompt) -> None:
    drafter, model = make_drafter(num_blocks=10)
    served = ScriptedTarget(drafter, prompt, name="a")
    exchange(drafter, [served], num_steps=9)
    width = len(served.table)
    large = ScriptedTarget(drafter, [i % VOCAB_SIZE for i in range(30)], name="b")
    exchange(drafter, [served, large], num_steps=9)
    refusal = _refusal(large)
    assert refusal.reason == speculator_pb2.REFUSAL_REASON_KV_CACHE_FULL
    assert "30 tokens do not fit" in refusal.message
    assert refusal.retry_after_ms > 0
    assert len(served.table) == width
    small = ScriptedTarget(drafter, [7, 8, 9], name="c")
    exchange(drafter, [served, small], num_steps=9)
    assert small.table
    drafter.held.disconnect(CONNECTION)
    assert model.pool.num_used == 0


def test_a_sequence_that_found_no_room_for_a_while_is_refused(prompt) -> None:
    """Sequences grow: what was taken may have no room later. Only those that cannot be computed go."""
    drafter, model = make_drafter(num_blocks=12)
    targets = [ScriptedTarget(drafter, [i, *prompt], name=str(i)) for i in range(2)]
    exchange(drafter, targets, num_steps=9)
    now_s = 0.0
    while not any(target.answers for target in targets):
        for target in targets:
            target.outcome(0, 1)
        exchange(drafter, targets, num_steps=3, now_s=now_s)
        now_s += 0.1
        assert len(targets[0].tokens) < 200
    (refused,) = [target for target in targets if target.answers]
    assert _refusal(refused).reason == speculator_pb2.REFUSAL_REASON_KV_CACHE_FULL
    (other,) = [target for target in targets if target is not refused]
    other.outcome(0, 1)
    exchange(drafter, [other], num_steps=9, now_s=now_s)
    assert other.table
    drafter.held.disconnect(CONNECTION)
    assert model.pool.num_used == 0


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tenant_weight": math.nan}, "tenant_weight"),
        ({"tenant_weight": math.inf}, "tenant_weight"),
        ({"tenant_weight": -1}, "tenant_weight"),
        ({"tenant_weight": 1e9}, "tenant_weight"),
        ({"round": 2**32 - 1}, "round"),
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [VOCAB_SIZE]}, "token_ids"),
        ({"token_ids": [1] * 100_000}, "token_ids"),
        ({"num_prompt_tokens": 10}, "num_prompt_tokens"),
        ({"draft_tokens": [1] * 1000}, "draft_tokens"),
        ({"draft_tokens": [2**32 - 1]}, "draft_tokens"),
        ({"tenant": "t" * 5000}, "tenant"),
        ({"cache_salt": b"s" * 5000}, "cache_salt"),
        ({"traceparent": "t" * 5000}, "traceparent"),
        ({"verification": 9}, "verification"),
        ({"mode": 9}, "mode"),
        ({"sampling": types_pb2.SamplingParams(temperature=math.nan)}, "temperature"),
        ({"sampling": types_pb2.SamplingParams(logit_bias={1: math.inf})}, "logit_bias"),
        ({"sampling": types_pb2.SamplingParams(repetition_penalty=-1)}, "repetition_penalty"),
    ],
)
def test_an_open_with_a_bad_value_is_refused_by_name(prompt, changes: dict[str, Any], field: str) -> None:
    drafter, _ = make_drafter()
    served = ScriptedTarget(drafter, prompt, name="served")
    bad = ScriptedTarget(drafter, [1], name="bad")
    bad.close()
    message = Open(sequence_id="bad", token_ids=[1, 2, 3], num_prompt_tokens=1, max_lookahead=3)
    for name in changes:
        message.ClearField(name)
    message.MergeFrom(Open(**changes))
    bad.send(open_sequence=message)
    exchange(drafter, [served, bad], num_steps=9)
    refusal = _refusal(bad)
    assert refusal.reason == speculator_pb2.REFUSAL_REASON_INVALID
    assert refusal.message.startswith(field)
    assert len(refusal.message) < 500
    assert served.table


@pytest.mark.parametrize("deadline_ms", [math.nan, -1.0])
def test_a_deadline_that_is_none_ends_the_sequence(prompt, deadline_ms: float) -> None:
    drafter, _ = make_drafter()
    target = ScriptedTarget(drafter, prompt, mode=types_pb2.SPECULATION_MODE_SD)
    target.outcome(0, 5, awaits=True)
    target.speculate_now(3, deadline_ms)
    exchange(drafter, [target])
    assert _refusal(target).message.startswith("deadline_ms ")
    assert drafter.held.next_deadline_s() is None


@pytest.mark.parametrize("deadline_ms", [math.inf, 1e300])
def test_a_deadline_that_never_comes_is_a_minute(prompt, deadline_ms: float) -> None:
    """The engine thread sleeps until then: the clock must be able to."""
    drafter, _ = make_drafter()
    target = ScriptedTarget(drafter, prompt, mode=types_pb2.SPECULATION_MODE_SD)
    target.outcome(0, 5, awaits=True)
    target.speculate_now(3, deadline_ms)
    assert drafter.held.next_deadline_s() == 60.0


def test_the_last_round_that_the_protocol_can_count(prompt) -> None:
    drafter, _ = make_drafter()
    target = ScriptedTarget(drafter, prompt)
    target.close()
    target.round = 2**32 - 2
    target.open()
    target.outcome(0, 1)
    target.round = 2**32 - 1
    exchange(drafter, [target], num_steps=9)
    assert _refusal(target).message.startswith("round ")


def test_an_error_of_ours_ends_one_sequence(prompt, monkeypatch) -> None:
    drafter, _ = make_drafter()
    targets = [ScriptedTarget(drafter, prompt, name=name) for name in "ab"]
    tree = drafter.held[CONNECTION, "a"].tree

    def broken(*_: object) -> None:
        raise IndexError("no such node")

    monkeypatch.setattr(tree, "commit", broken, raising=False)
    monkeypatch.setattr(tree, "free", broken, raising=False)
    for target in targets:
        target.outcome(0, 1)
    exchange(drafter, targets, num_steps=9)
    assert _refusal(targets[0]).reason == speculator_pb2.REFUSAL_REASON_INTERNAL
    assert targets[1].table


def test_refused_ids_are_bounded(prompt) -> None:
    drafter, _ = make_drafter(max_sequences=1)
    ScriptedTarget(drafter, prompt)
    for i in range(10_000):
        drafter.held.apply(
            CONNECTION, speculator_pb2.SpeculateRequest(open_sequence=Open(sequence_id=f"o{i}", token_ids=[1])), 0.0
        )
    assert (CONNECTION, "o9999") in drafter.held.refusals
    assert (CONNECTION, "o1") not in drafter.held.refusals


def test_a_sequence_that_outgrows_the_context_of_the_draft_is_given_back(prompt) -> None:
    drafter, model = make_drafter()
    target = ScriptedTarget(drafter, prompt)
    exchange(drafter, [target], num_steps=9)
    drafter.held._limits = replace(drafter.held._limits, max_context=len(prompt) + 1)
    target.outcome(0, 3)
    assert len(drafter.held) == 1
    target.outcome(0, 4)
    exchange(drafter, [target])
    refusal = _refusal(target)
    assert refusal.reason == speculator_pb2.REFUSAL_REASON_INVALID
    assert refusal.message == f"{len(prompt) + 2} tokens are beyond the draft's context of {len(prompt) + 1}"
    assert len(drafter.held) == 0
    assert model.pool.num_used == 0
