"""Dense rows of the drafter: sent for the selected branch alone, exact, and given back with their branches."""

from __future__ import annotations

import random

import pytest
import torch

from specpool.algorithm.sampling import SamplingParams
from specpool.v1 import speculator_pb2, types_pb2

from .conftest import CONNECTION, VOCAB_SIZE, ScriptedTarget, exchange, make_drafter, random_outcome

REJECTION = types_pb2.VERIFICATION_MODE_REJECTION
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=1000, seed=11)


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
        random_outcome(target, rng)
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
