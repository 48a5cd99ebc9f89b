"""The drafter against naive drafting, over random outcomes; answers, resync, and nothing leaked."""

from __future__ import annotations

import random
from typing import get_args

import pytest

from specpool.algorithm.sampling import SamplingParams
from specpool.algorithm.verification import VerificationMode
from specpool.v1 import speculator_pb2, types_pb2
from specpool_speculator.config import FanOutPolicy

from .conftest import CONNECTION, VOCAB_SIZE, ScriptedTarget, exchange, make_drafter, naive_draft, random_outcome

SD = types_pb2.SPECULATION_MODE_SD
REJECTION = types_pb2.VERIFICATION_MODE_REJECTION
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=1000, seed=11)
PENALIZED = SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=1.0, max_tokens=1000, seed=5)
GREEDY = SamplingParams(temperature=0, max_tokens=1000, seed=7)


@pytest.mark.parametrize(
    ("sampling", "mode"),
    [
        (GREEDY, VerificationMode.GREEDY),
        (PENALIZED, VerificationMode.GREEDY),
        (SAMPLED, VerificationMode.COUPLED),
        (SAMPLED, VerificationMode.REJECTION),
    ],
)
@pytest.mark.parametrize("policy", get_args(FanOutPolicy))
@pytest.mark.parametrize("num_blocks", [600, 30])
def test_every_entry_is_what_naive_drafting_gives(sampling, mode, num_blocks, policy, prompt) -> None:
    drafter, model = make_drafter(num_blocks, fan_out_policy=policy)
    verification = REJECTION if mode is VerificationMode.REJECTION else types_pb2.VERIFICATION_MODE_COUPLED
    targets = [
        ScriptedTarget(drafter, prompt[: 7 + i], name=f"s{i}", sampling=sampling, verification=verification)
        for i in range(2)
    ]
    rng = random.Random(num_blocks)
    num_checked = 0
    for _ in range(25):
        exchange(drafter, targets, num_steps=rng.randint(0, 8))
        for target in targets:
            draft = naive_draft(target, mode)
            for (num_accepted, bonus), tokens in target.table.items():
                path = [*target.tokens, *target.in_flight[:num_accepted], bonus]
                assert tokens == draft(path, len(tokens))
                num_checked += len(tokens)
            assert not target.answers or mode is VerificationMode.REJECTION
            if rng.random() < 0.8:
                random_outcome(target, rng)
    assert num_checked > 100
    drafter.held.disconnect(CONNECTION)
    assert model.pool.num_free == num_blocks


def test_idle_when_all_guesses_are_deep_enough(prompt) -> None:
    drafter, _ = make_drafter()
    target = ScriptedTarget(drafter, prompt)
    exchange(drafter, [target], num_steps=50)
    assert len(target.table) == 8
    assert {len(tokens) for tokens in target.table.values()} == {3}
    assert not drafter.step()


def test_a_hit_repeats_no_work(prompt) -> None:
    drafter, model = make_drafter(row_budget=64, fan_out_policy="geometric")
    target = ScriptedTarget(drafter, prompt)
    exchange(drafter, [target], num_steps=50)
    (num_accepted, bonus), tokens = next(iter(target.table.items()))
    num_tokens = model.num_tokens
    target.outcome(num_accepted, bonus, tokens)
    exchange(drafter, [target], num_steps=0)
    # The ranks of v0 .. v3 are known from the last round: all guesses are there before any forward.
    assert {k for k, _ in target.table} == {0, 1, 2, 3}
    assert model.num_tokens == num_tokens


def test_late_branch_becomes_a_guess(prompt) -> None:
    drafter, _ = make_drafter(row_budget=64)
    target = ScriptedTarget(drafter, prompt)
    exchange(drafter, [target], num_steps=50)
    (num_accepted, bonus), tokens = next(iter(target.table.items()))
    # The table came too late for the target, which verifies something else.
    other = next(t for t in range(VOCAB_SIZE) if t != tokens[0])
    target.outcome(num_accepted, bonus, [other], backup=True)
    exchange(drafter, [target], num_steps=0)
    assert target.table[0, tokens[0]][:2] == tokens[1:3]


def test_synchronous_mode_drafts_only_when_asked(prompt) -> None:
    drafter, model = make_drafter()
    target = ScriptedTarget(drafter, prompt, mode=SD)
    exchange(drafter, [target], num_steps=9)
    assert model.num_tokens == len(prompt)
    draft = naive_draft(target, VerificationMode.GREEDY)
    target.outcome(0, 5, awaits=True)
    assert not drafter.step()
    for _ in range(4):
        num_tokens = model.num_tokens
        target.speculate_now(3)
        exchange(drafter, [target], num_steps=9)
        answer = target.answers.pop()
        assert list(answer.draft_tokens) == draft(target.tokens, 3)
        assert answer.round == target.round - 1
        # Three tokens take the new root, its two successors, and at most the last accepted draft token.
        assert model.num_tokens - num_tokens <= 4
        target.start_round(answer.draft_tokens)
        assert not drafter.step()
        assert not target.table
        target.outcome(3, 2, awaits=True)


def test_deadline_gives_what_there_is(prompt) -> None:
    drafter, _ = make_drafter()
    target = ScriptedTarget(drafter, prompt, mode=SD)
    exchange(drafter, [target], num_steps=9)
    target.outcome(0, 5, awaits=True)
    target.speculate_now(3, deadline_ms=10)
    exchange(drafter, [target], num_steps=1)
    assert not target.answers
    exchange(drafter, [target], num_steps=0, now_s=1.0)
    assert len(target.answers.pop().draft_tokens) == 1


def test_rejection_sends_distributions_of_the_tokens_in_flight(prompt) -> None:
    drafter, _ = make_drafter(distribution_top_m=5)
    target = ScriptedTarget(drafter, prompt, sampling=SAMPLED, verification=REJECTION)
    exchange(drafter, [target], num_steps=50)
    (num_accepted, bonus), tokens = max(target.table.items(), key=lambda item: len(item[1]))
    target.outcome(num_accepted, bonus, tokens[:2])
    exchange(drafter, [target], num_steps=0)
    message = target.answers.pop()
    assert message.round == 1
    assert list(message.draft_tokens) == tokens[:2]
    for token, distribution in zip(tokens, message.distributions, strict=False):
        assert token in distribution.token_ids
        assert sum(distribution.probabilities) == pytest.approx(1)
        assert len(distribution.token_ids) <= 9
    target.outcome(0, 1, [2, 3], backup=True)
    exchange(drafter, [target], num_steps=0)
    assert not target.answers


def test_resync_when_rounds_do_not_fit(prompt) -> None:
    drafter, model = make_drafter()
    target = ScriptedTarget(drafter, prompt)
    target.round = 3
    target.outcome(0, 1)
    exchange(drafter, [target])
    assert "round 3 announced" in target.answers.pop().reason
    target.outcome(0, 1)
    exchange(drafter, [target])
    assert "not held" in target.answers.pop().reason
    target.open()
    exchange(drafter, [target], num_steps=9)
    assert target.table
    target.round = 1  # a message from the past is dropped without a word
    target.outcome(0, 1)
    exchange(drafter, [target])
    assert not target.answers
    assert drafter.held.counters.num_stale == 3
    assert drafter.held.counters.num_resyncs == 2
    target.close()
    assert model.pool.num_used == 0


def test_more_accepted_than_in_flight_is_a_resync(prompt) -> None:
    drafter, _ = make_drafter()
    target = ScriptedTarget(drafter, prompt)
    target.outcome(2, 1)
    exchange(drafter, [target])
    assert "2 of 0 draft tokens" in target.answers.pop().reason


def test_tokens_outside_of_the_drafts_vocabulary_end_speculation_only_there(prompt) -> None:
    drafter, model = make_drafter()
    targets = [ScriptedTarget(drafter, prompt, name=name) for name in "ab"]
    targets[0].outcome(0, VOCAB_SIZE + 3)
    exchange(drafter, targets, num_steps=9)
    targets[0].outcome(0, 1)
    exchange(drafter, targets, num_steps=9)
    (refusal,) = targets[0].answers
    assert refusal.reason == speculator_pb2.REFUSAL_REASON_INVALID
    assert "token 27, beyond the draft's vocabulary" in refusal.message
    assert not targets[0].table
    assert targets[1].table
    drafter.held.disconnect(CONNECTION)
    assert model.pool.num_used == 0


def test_prefix_cache_is_salted_and_saves_the_prefill(prompt) -> None:
    drafter, model = make_drafter()
    first = ScriptedTarget(drafter, prompt, name="a")
    exchange(drafter, [first], num_steps=1)
    num_tokens = model.num_tokens
    second = ScriptedTarget(drafter, prompt, name="b")
    first.close()
    exchange(drafter, [second], num_steps=1)
    assert model.num_tokens - num_tokens == len(prompt) - 8
    counters = drafter.held.counters
    assert (counters.num_prefix_queried_tokens, counters.num_prefix_hit_tokens) == (2 * len(prompt), 8)


def test_nothing_is_drafted_beyond_the_last_token(prompt) -> None:
    drafter, _ = make_drafter()
    target = ScriptedTarget(drafter, prompt, sampling=SamplingParams(temperature=0, max_tokens=3, seed=1))
    exchange(drafter, [target], num_steps=50)
    assert {len(tokens) for tokens in target.table.values()} == {2}


def test_a_bias_on_a_token_that_only_the_target_has_changes_nothing() -> None:
    drafter, _ = make_drafter()
    drafter.held.connect(2, VOCAB_SIZE + 8)
    tables = []
    for bias in ({5: 3.0}, {5: 3.0, VOCAB_SIZE + 3: 9.0}):
        sampling = SamplingParams(temperature=0, max_tokens=1000, seed=7, logit_bias=bias)
        target = ScriptedTarget(drafter, [1, 2, 3], name=str(len(bias)), sampling=sampling, connection=2)
        exchange(drafter, [target], num_steps=4)
        tables.append(target.table)
        target.send(close_sequence=speculator_pb2.CloseSequence(sequence_id=target.name))
    assert not drafter.held.refusals.counts
    assert tables[0]
    assert tables[0] == tables[1]


def test_a_tuned_saguaro_constant_is_tried_and_what_is_reported_stays_exact(prompt) -> None:
    drafter, _ = make_drafter(tune_saguaro=True)
    target = ScriptedTarget(drafter, prompt, sampling=SAMPLED, verification=REJECTION)
    tried, rng = set(), random.Random(0)
    for _ in range(120):
        exchange(drafter, [target], num_steps=2)
        tried.add(drafter._ranker.saguaro_constant)
        for answer in target.answers:
            for token, distribution in zip(answer.draft_tokens, answer.distributions, strict=True):
                assert token in distribution.token_ids
                assert sum(distribution.probabilities) == pytest.approx(1, abs=1e-5)
        target.answers.clear()
        random_outcome(target, rng)
    assert len(tried) > 1
