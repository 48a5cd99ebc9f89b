"""Batching, admission and preemption, without a model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specpool.errors import TargetUnavailable
from specpool_engine.modeling.paged_kv import BlockPool
from specpool_target.engine.scheduler import Scheduler
from specpool_target.engine.sequence import Draft, DraftSource, SequenceState, TargetSequence


@pytest.fixture
def scheduler_for(request_for):
    def make(num_blocks=16, *, batch=4, tokens=32, context=64):
        pool = BlockPool(num_blocks, 4)
        return Scheduler(pool, max_context=context, max_batch_size=batch, max_batch_tokens=tokens, max_waiting=9), pool

    return make


@pytest.fixture
def sequence_for(request_for):
    def make(name, num_tokens, max_length=64):
        request = request_for(name, [ord(name) % 17] * num_tokens, max_tokens=60)
        return TargetSequence(request, max_length=max_length)

    return make


def compute(step):
    """What the engine does with a step: the KV is written, and complete rounds commit one token."""
    for scheduled in step.segments:
        segment = scheduled.segment()
        segment.kv.reserve(len(segment.tokens))
        segment.kv.advance(len(segment.tokens))
        if scheduled.is_complete:
            sequence = scheduled.sequence
            sequence.kv.truncate(len(sequence.tokens))
            sequence.tokens.append(1)
            sequence.draft = Draft()


def names(segments):
    return {s.sequence.id: s.num_tokens for s in segments}


def test_rounds_come_before_prefill_and_share_the_budget(scheduler_for, sequence_for):
    scheduler, _ = scheduler_for(tokens=12)
    first, second = sequence_for("a", 5), sequence_for("b", 30)
    scheduler.add(first)
    compute(scheduler.schedule())
    scheduler.add(second)
    first.draft = Draft([2, 2, 2], DraftSource.SPECULATOR)
    step = scheduler.schedule()
    assert names(step.segments) == {"a": 4, "b": 8}
    assert [s.is_complete for s in step.segments] == [True, False]
    assert [len(s.segment().tokens) for s in step.segments] == [4, 8]
    assert [s.segment().num_logits for s in step.segments] == [4, 0]
    compute(step)
    assert second.state is SequenceState.PREFILL


def test_rounds_over_the_budget_still_leave_a_token_for_prefill(scheduler_for, sequence_for):
    scheduler, _ = scheduler_for(tokens=2)
    first, second = sequence_for("a", 2), sequence_for("b", 6)
    scheduler.add(first)
    compute(scheduler.schedule())
    first.draft = Draft([2, 2, 2], DraftSource.SPECULATOR)
    scheduler.add(second)
    assert names(scheduler.schedule().segments) == {"a": 4, "b": 1}


def test_batch_size_and_order_of_admission(scheduler_for, sequence_for):
    scheduler, _ = scheduler_for(batch=2)
    for name in "abc":
        scheduler.add(sequence_for(name, 3))
    assert [s.id for s in scheduler.schedule().admitted] == ["a", "b"]
    scheduler.remove(scheduler.running[0])
    assert [s.id for s in scheduler.schedule().admitted] == ["c"]


def test_admission_waits_for_blocks_of_the_whole_prompt(scheduler_for, sequence_for):
    scheduler, pool = scheduler_for(num_blocks=8, tokens=8)
    scheduler.add(sequence_for("a", 20))  # 5 blocks
    scheduler.add(sequence_for("b", 16))  # 4: does not fit beside it, though its first chunk would
    compute(scheduler.schedule())
    assert [s.id for s in scheduler.schedule().admitted] == []
    assert [s.id for s in scheduler.running] == ["a"]
    scheduler.remove(scheduler.running[0])
    assert [s.id for s in scheduler.schedule().admitted] == ["b"]
    assert pool.num_used == 0  # nothing reserved before the forward


def test_youngest_is_preempted_and_keeps_its_tokens_and_draft(scheduler_for, sequence_for):
    scheduler, pool = scheduler_for(num_blocks=4)
    old, young = sequence_for("a", 8), sequence_for("b", 8)
    for sequence in (old, young):
        scheduler.add(sequence)
    compute(scheduler.schedule())
    young.draft = Draft([5], DraftSource.BACKUP)
    young.round = 3
    step = scheduler.schedule()
    assert [s.id for s in step.preempted] == ["b"]
    assert names(step.segments) == {"a": 1}
    compute(step)
    assert (young.state, young.kv, young.round, young.draft.tokens) == (SequenceState.WAITING, None, 3, [5])
    assert len(young.tokens) == 9
    scheduler.remove(old)
    step = scheduler.schedule()
    assert [s.id for s in step.admitted] == ["b"]
    # Its prompt is still cached; the rest and the draft are computed at once.
    (segment,) = step.segments
    assert segment.is_complete
    assert list(segment.segment().tokens)[-1] == 5
    assert segment.segment().num_logits == 2
    compute(step)
    scheduler.remove(young)
    assert pool.num_used == 0


def test_sequences_that_await_a_speculation_are_left_out(scheduler_for, sequence_for):
    scheduler, _ = scheduler_for()
    for name in "ab":
        scheduler.add(sequence_for(name, 3))
    compute(scheduler.schedule())
    scheduler.running[0].await_deadline_s = 1.0
    assert scheduler.running[0].state is SequenceState.AWAITING_SPECULATION
    assert names(scheduler.schedule().segments) == {"b": 1}


def test_draft_is_never_cut_by_the_prefill_budget(scheduler_for, sequence_for):
    scheduler, _ = scheduler_for(tokens=6)
    sequence = sequence_for("a", 6)
    sequence.draft = Draft([1, 2, 3], DraftSource.BACKUP)
    scheduler.add(sequence)
    step = scheduler.schedule()
    assert names(step.segments) == {"a": 5}
    compute(step)
    assert names(scheduler.schedule().segments) == {"a": 4}


def continuation_of(request_for, name):
    request = replace(request_for(name, [1, 2, 3], max_tokens=60), committed_tokens=(7, 8))
    return TargetSequence(request, max_length=64)


def test_what_another_target_began_goes_before_what_is_new(scheduler_for, sequence_for, request_for):
    scheduler, _ = scheduler_for(batch=1)
    for name in "ab":
        scheduler.add(sequence_for(name, 3))
    for name in "cd":
        scheduler.add(continuation_of(request_for, name))
    waited_there = replace(request_for("e", [1, 2, 3]), was_running=True)
    scheduler.add(TargetSequence(waited_there, max_length=64))
    assert [sequence.id for sequence in scheduler.waiting] == ["c", "d", "e", "a", "b"]


def test_a_full_target_has_places_left_for_what_another_one_began(scheduler_for, sequence_for):
    scheduler, _ = scheduler_for(batch=4)
    scheduler.check_admissible(3, num_submitted=12)
    with pytest.raises(TargetUnavailable, match="9 sequences are waiting already, at most 9 may"):
        scheduler.check_admissible(3, num_submitted=13)
    # As many as a target like this one has when it is lost: 4 in the batch and 9 that wait.
    scheduler.check_admissible(3, num_submitted=25, is_continuation=True)
    with pytest.raises(TargetUnavailable, match="22 sequences are waiting already, at most 22 may"):
        scheduler.check_admissible(3, num_submitted=26, is_continuation=True)


def test_a_short_prompt_is_through_before_a_long_one_that_came_first(scheduler_for, sequence_for):
    scheduler, _ = scheduler_for(tokens=12, num_blocks=40)
    long, short = sequence_for("a", 60), sequence_for("b", 9)
    scheduler.add(long)
    compute(scheduler.schedule())
    scheduler.add(short)
    compute(scheduler.schedule())
    assert short in scheduler.running
    compute(scheduler.schedule())
    assert short.num_uncomputed == 1
    assert long.num_uncomputed > 20
    while long.num_uncomputed > 1:
        compute(scheduler.schedule())


def test_rounds_bound_what_a_prompt_adds_to_their_time(scheduler_for, sequence_for):
    scheduler, _ = scheduler_for(tokens=32, num_blocks=60)
    running, prompt = sequence_for("a", 4), sequence_for("b", 62)

    def step():
        scheduled = scheduler.schedule()
        compute(scheduled)
        seconds = 1.0 + 0.1 * sum(one.num_tokens for one in scheduled.segments)
        scheduler.observe(scheduled, seconds)
        return seconds

    scheduler.add(running)
    for _ in range(8):
        step()
    scheduler.add(prompt)
    times = [step() for _ in range(6)]
    assert max(times) < 2.4, "twice a round's own 1.1 s, within a tenth"
    assert max(times) > 1.75
