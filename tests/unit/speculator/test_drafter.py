"""The drafter against naive drafting, over random outcomes; answers, resync, and nothing leaked."""

from __future__ import annotations

import random
from typing import get_args

import pytest
import torch

from specpool.algorithm.sampling import SamplingParams
from specpool.algorithm.verification import VerificationMode
from specpool.v1 import speculator_pb2, types_pb2
from specpool_speculator.config import FanOutPolicy

from .conftest import CONNECTION, VOCAB_SIZE, ScriptedTarget, exchange, make_drafter, naive_draft

SD = types_pb2.SPECULATION_MODE_SD
REJECTION = types_pb2.VERIFICATION_MODE_REJECTION
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=1000, seed=11)
PENALIZED = SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=1.0, max_tokens=1000, seed=5)
GREEDY = SamplingParams(temperature=0, max_tokens=1000, seed=7)


def _random_outcome(target: ScriptedTarget, rng: random.Random) -> None:
    """A guessed outcome with a part of its tokens, a backup, nothing, or a token nobody guessed."""
    entry = rng.choice([*target.table.items(), None]) if target.table else None
    if entry is not None and rng.random() < 0.7:
        (num_accepted, bonus), tokens = entry
        target.outcome(num_accepted, bonus, tokens[: rng.randint(0, len(tokens))])
        return
    draft = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 3))]
    target.outcome(rng.randint(0, len(target.in_flight)), rng.randrange(VOCAB_SIZE), draft, backup=True)


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
                _random_outcome(target, rng)
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
        _random_outcome(target, rng)
    assert len(tried) > 1


class RecordingChannel:
    """Takes dense rows, or refuses them."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.bodies: list[torch.Tensor] = []

    def offer(self, rows: torch.Tensor) -> speculator_pb2.DenseTransfer | None:
        if self.refuses:
            return None
        self.bodies.append(rows)
        return speculator_pb2.DenseTransfer(
            group=1, number=len(self.bodies), num_rows=rows.shape[0], vocab_size=rows.shape[1], dtype="float16"
        )


def _dense_target(prompt, channel, **settings):
    drafter, model = make_drafter(row_budget=64, **settings)
    drafter.held.set_channel(CONNECTION, channel)
    target = ScriptedTarget(drafter, prompt, sampling=SAMPLED, verification=REJECTION)
    exchange(drafter, [target], num_steps=50)
    return drafter, model, target


def _deepest(target: ScriptedTarget) -> tuple[tuple[int, int], list[int]]:
    return max(target.table.items(), key=lambda item: len(item[1]))


def test_dense_rows_are_sent_for_the_selected_branch_alone(prompt) -> None:
    channel = RecordingChannel()
    drafter, _, target = _dense_target(prompt, channel)
    assert not channel.bodies
    (num_accepted, bonus), tokens = _deepest(target)
    target.outcome(num_accepted, bonus, tokens[:2])
    exchange(drafter, [target], num_steps=0)
    message = target.answers.pop()
    assert (message.transfer.num_rows, message.transfer.vocab_size) == (2, VOCAB_SIZE)
    assert [len(row.token_ids) for row in message.distributions] == [0, 0]
    assert len(channel.bodies) == 1
    (body,) = channel.bodies
    assert body.dtype is torch.float16
    assert (body[range(2), tokens[:2]] > 0).all()
    torch.testing.assert_close(body.float().sum(1), torch.ones(2), atol=0.01, rtol=0)


def test_the_sampling_parameters_are_in_the_dense_rows(prompt) -> None:
    """top_p leaves few tokens: the others have no probability at all."""
    channel = RecordingChannel()
    drafter, _, target = _dense_target(prompt, channel, distribution_top_m=VOCAB_SIZE)
    sparse_drafter, _ = make_drafter(row_budget=64, distribution_top_m=VOCAB_SIZE)
    (num_accepted, bonus), tokens = _deepest(target)
    target.outcome(num_accepted, bonus, tokens[:1])
    exchange(drafter, [target], num_steps=0)
    sparse_target = ScriptedTarget(sparse_drafter, prompt, sampling=SAMPLED, verification=REJECTION)
    exchange(sparse_drafter, [sparse_target], num_steps=50)
    sparse_target.outcome(num_accepted, bonus)  # the same context
    exchange(sparse_drafter, [sparse_target], num_steps=50)
    (row,) = (sparse_drafter.held[CONNECTION, "s"].tree.root.ranks.distribution,)
    expected = torch.zeros(VOCAB_SIZE).scatter(0, torch.tensor(row.token_ids), torch.tensor(row.probabilities))
    torch.testing.assert_close(channel.bodies[0][0].float(), expected, atol=0.002, rtol=0)


def test_rows_are_given_back_with_their_branches(prompt) -> None:
    rng = random.Random(4)
    drafter, _, target = _dense_target(prompt, RecordingChannel())
    memory = drafter.row_memory
    held = []
    for _ in range(30):
        exchange(drafter, [target], num_steps=rng.randint(0, 8))
        _random_outcome(target, rng)
        tree = drafter.held[CONNECTION, "s"].tree
        nodes = [
            n for n in tree.root.subtree() if n.ranks is not None and not hasattr(n.ranks.distribution, "token_ids")
        ]
        assert memory.used == len(nodes) * VOCAB_SIZE * 2
        held.append(memory.used)
    assert max(held) > min(held)
    target.close()
    assert memory.used == 0


@pytest.mark.parametrize("limit", [0, 10 * VOCAB_SIZE * 2])
def test_beyond_the_memory_rows_are_sparse_and_mixed_with_dense_ones(prompt, limit) -> None:
    rng = random.Random(2)
    channel = RecordingChannel()
    drafter, _, target = _dense_target(prompt, channel, distribution_memory_bytes=limit)
    kinds = set()
    for _ in range(60):
        exchange(drafter, [target], num_steps=rng.randint(2, 8))
        assert drafter.row_memory.used <= limit
        if target.table:
            (num_accepted, bonus), tokens = _deepest(target)
            target.outcome(num_accepted, bonus, tokens)
            exchange(drafter, [target], num_steps=0)
        while target.answers:
            message = target.answers.pop()
            dense = [not row.token_ids for row in message.distributions]
            assert sum(dense) == message.transfer.num_rows
            kinds.update(dense)
    assert kinds == ({False} if limit == 0 else {False, True})


def test_without_a_channel_for_its_rows_the_answer_is_empty(prompt) -> None:
    channel = RecordingChannel()
    drafter, _, target = _dense_target(prompt, channel)
    for lose in (lambda: setattr(channel, "refuses", True), lambda: drafter.held.drop_channel(CONNECTION, channel)):
        (num_accepted, bonus), tokens = _deepest(target)
        lose()
        target.outcome(num_accepted, bonus, tokens[:2])
        exchange(drafter, [target], num_steps=0)
        message = target.answers.pop()
        assert message.round == target.round
        assert not message.distributions
        exchange(drafter, [target], num_steps=50)
    assert not channel.bodies
    # What is drafted after the loss is sparse again.
    target.outcome(0, 3)
    exchange(drafter, [target], num_steps=50)
    (num_accepted, bonus), tokens = _deepest(target)
    target.outcome(num_accepted, bonus, tokens[:1])
    exchange(drafter, [target], num_steps=0)
    assert target.answers.pop().distributions[0].token_ids


def test_only_the_channel_in_use_can_be_dropped(prompt) -> None:
    old, new = RecordingChannel(), RecordingChannel()
    drafter, _, target = _dense_target(prompt, old)
    drafter.held.set_channel(CONNECTION, new)
    drafter.held.drop_channel(CONNECTION, old)
    (num_accepted, bonus), tokens = _deepest(target)
    target.outcome(num_accepted, bonus, tokens[:1])
    exchange(drafter, [target], num_steps=0)
    assert len(new.bodies) == 1
