"""Which rows a step runs."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from statistics import mean

import pytest

from specpool.algorithm.verification import VerificationMode
from specpool.v1 import types_pb2
from specpool_speculator.engine.scheduler import branch_candidates, schedule_step, share_rows

from .conftest import VOCAB_SIZE, ScriptedTarget, exchange, make_drafter


def _schedule(drafter, model, row_budget=6, max_prefill_tokens=64):
    step = schedule_step(list(drafter.held), model.pool, row_budget=row_budget, max_prefill_tokens=max_prefill_tokens)
    return step.work


def _cancel(scheduled) -> None:
    for p in scheduled:
        p.work.cancel()


def test_prefill_in_chunks_then_ranks(prompt) -> None:
    drafter, model = make_drafter(max_prefill_tokens=4)
    target = ScriptedTarget(drafter, prompt)
    sizes = []
    while not target.table:
        sizes.append([(len(p.work.tokens), len(p.work.nodes)) for p in _schedule(drafter, model, max_prefill_tokens=4)])
        exchange(drafter, [target])
    assert sizes == [[(4, 0)], [(4, 0)], [(1, 1)]]


def test_path_and_branches_share_a_step(prompt) -> None:
    drafter, model = make_drafter()
    target = ScriptedTarget(drafter, prompt)
    exchange(drafter, [target], num_steps=50)
    bonus = next(b for k, b in target.table)
    target.outcome(0, bonus, [1, 2], backup=True)
    exchange(drafter, [target], num_steps=0)
    scheduled = _schedule(drafter, model)
    assert [p.work.tokens for p in scheduled if not p.is_branch] == [[1, 2]]
    branches = [p for p in scheduled if p.is_branch]
    assert branches
    assert len(branches) <= 6
    assert len({id(p.work.kv) for p in scheduled}) == len(scheduled)
    _cancel(scheduled)


def test_most_likely_branches_first(prompt) -> None:
    drafter, model = make_drafter()
    target = ScriptedTarget(drafter, prompt)
    exchange(drafter, [target], num_steps=1)
    (sequence,) = drafter.held
    candidates = branch_candidates(sequence)
    chosen = share_rows(candidates, 3)
    assert [c.value for c in chosen] == sorted((c.value for c in candidates), reverse=True)[:3]
    assert [p.work.tokens[0] for p in _schedule(drafter, model, row_budget=3)] == [c.node.token for c in chosen]


def test_rows_are_shared_by_tenant_weight_and_none_is_wasted(prompt) -> None:
    drafter, model = make_drafter()
    targets = [
        ScriptedTarget(drafter, prompt, name="a", tenant="heavy", weight=3.0),
        ScriptedTarget(drafter, prompt, name="b", tenant="light", weight=1.0),
    ]
    exchange(drafter, targets, num_steps=1)
    rows = Counter(p.sequence.options.tenant for p in _schedule(drafter, model, row_budget=8))
    assert rows == {"heavy": 6, "light": 2}
    assert len(_schedule(drafter, model, row_budget=100)) == 16


def test_a_waiting_target_comes_first(prompt) -> None:
    drafter, model = make_drafter()
    targets = [
        ScriptedTarget(drafter, prompt, name="ahead"),
        ScriptedTarget(drafter, prompt, name="waits", mode=types_pb2.SPECULATION_MODE_SD),
    ]
    exchange(drafter, targets, num_steps=2)
    targets[1].outcome(0, 5, awaits=True)
    targets[1].speculate_now(3)
    scheduled = _schedule(drafter, model, row_budget=1)
    assert scheduled[0].sequence.key[1] == "waits"
    _cancel(scheduled)
    exchange(drafter, targets, num_steps=1)
    scheduled = _schedule(drafter, model, row_budget=1)
    assert [p.sequence.key[1] for p in scheduled] == ["waits"]


@dataclass(frozen=True)
class Shares:
    """What sequences got of a speculator, on average."""

    width: float
    """Guesses with a token."""
    depth: float
    """Tokens of the deepest guess."""
    drafted: float
    """Share of the sequences with any token."""


def _crowd(num_sequences: int) -> Shares:
    """After one round's worth of steps: a step for the prompts, then twice as many as K, 16 rows each."""
    drafter, _ = make_drafter(num_blocks=5000, row_budget=16, max_prefill_tokens=1000)
    rng = random.Random(3)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(9)] for _ in range(num_sequences)]
    targets = [ScriptedTarget(drafter, prompt, name=f"s{i}") for i, prompt in enumerate(prompts)]
    exchange(drafter, targets, num_steps=7)
    assert not any(target.answers for target in targets), "nobody is refused"
    depths = [max(map(len, target.table.values()), default=0) for target in targets]
    return Shares(
        width=mean(sum(bool(tokens) for tokens in target.table.values()) for target in targets),
        depth=mean(depths),
        drafted=mean(depth > 0 for depth in depths),
    )


def test_a_crowded_speculator_sheds_width_then_depth_then_sequences() -> None:
    roomy, crowded, full, overfull = (_crowd(num_sequences) for num_sequences in (4, 8, 32, 96))
    assert roomy == Shares(width=8, depth=3, drafted=1)
    assert crowded.width < 0.8 * roomy.width
    assert (crowded.depth, crowded.drafted) == (3, 1)
    assert full.width < crowded.width
    assert full.depth < crowded.depth
    assert full.drafted == 1
    assert overfull.width < full.width
    assert overfull.depth < full.depth
    assert 0.8 < overfull.drafted < 1


def test_a_first_token_goes_before_a_further_one_that_is_somewhat_likelier(prompt) -> None:
    drafter, _ = make_drafter(fan_out_policy="best_first", row_budget=2)
    target = ScriptedTarget(drafter, prompt)
    exchange(drafter, [target], num_steps=3)
    (sequence,) = drafter.held
    firsts, further = [], []
    for candidate in branch_candidates(sequence):
        is_first = candidate.node.parent in sequence.tree.path
        used = candidate.probability
        (firsts if is_first else further).append((candidate.value, used))
    assert firsts
    assert further
    assert all(value == pytest.approx(4 * used) for value, used in firsts)
    assert all(value <= used for value, used in further)


def test_full_cache_sheds_branches_before_sequences(prompt) -> None:
    drafter, model = make_drafter(num_blocks=12)
    first = ScriptedTarget(drafter, prompt, name="a")
    exchange(drafter, [first], num_steps=20)
    width = sum(bool(tokens) for tokens in first.table.values())
    assert 0 < width <= 8
    second = ScriptedTarget(drafter, [7, *prompt], name="b")
    exchange(drafter, [first, second], num_steps=20)
    assert second.table, "branches of the first made room for the second"
    assert len(drafter.held) == 2
    second.close()
    first.close()
    assert model.pool.num_used == 0


def test_best_first_guesses_where_the_draft_is_unsure(prompt) -> None:
    drafter, _ = make_drafter(fan_out_policy="best_first", fan_out_budget=8)
    target = ScriptedTarget(drafter, prompt)
    exchange(drafter, [target], num_steps=20)
    (_, bonus), drafted = next(entry for entry in target.table.items() if len(entry[1]) == 3)
    target.outcome(0, bonus, drafted)
    exchange(drafter, [target], num_steps=1)
    (sequence,) = drafter.held
    path = sequence.tree.path
    # certain of every draft token but the second
    for node, certainty in zip(path, (0.98, 0.3, 0.98, 0.98), strict=True):
        rest = (1 - certainty) / (len(node.ranks.drafted) - 1)
        node.ranks = replace(node.ranks, probabilities=(certainty, *[rest] * (len(node.ranks.drafted) - 1)))
    guesses = [branch for branch in sequence.find_branches() if branch.probability]
    assert len(guesses) == 8
    at = Counter(guess.outcome[0] for guess in guesses)
    assert at[1] >= 6
    assert at[3] >= 1
    best = max(guesses, key=lambda guess: guess.probability)
    assert best.outcome == (3, path[3].ranks.drafted[0])
    assert best.probability == pytest.approx(0.98 * 0.3 * 0.98 * 0.98)
    assert 0 < sum(guess.probability for guess in guesses) <= 1


def test_the_value_of_a_row_is_that_all_before_it_is_used(prompt) -> None:
    drafter, _ = make_drafter(fan_out_policy="best_first", row_budget=2)
    target = ScriptedTarget(drafter, prompt)
    exchange(drafter, [target], num_steps=2)
    (sequence,) = drafter.held
    deeper = [branch for branch in branch_candidates(sequence) if len(branch.tokens) == 1]
    assert deeper
    for branch in deeper:
        assert branch.node.parent.token == branch.outcome[1]
        assert branch.value == pytest.approx(branch.probability * branch.parent.ranks.probabilities[0])


def test_outcomes_teach_the_calibration(prompt) -> None:
    drafter, _ = make_drafter()
    target = ScriptedTarget(drafter, prompt)
    calibration = drafter.estimates[VerificationMode.GREEDY].calibration
    before = calibration.lift
    for _ in range(20):
        exchange(drafter, [target], num_steps=3)
        (_, bonus), drafted = next(entry for entry in target.table.items() if entry[1])
        target.outcome(0, bonus, drafted)
    assert calibration.lift != before
    assert calibration.outside < 0.02


def test_rows_that_are_not_worth_their_time_are_left_out(prompt) -> None:
    drafter, model = make_drafter()
    target = ScriptedTarget(drafter, prompt)
    exchange(drafter, [target], num_steps=1)
    (sequence,) = drafter.held
    values = sorted((c.value for c in branch_candidates(sequence)), reverse=True)
    free, dear = (
        schedule_step([sequence], model.pool, row_budget=6, max_prefill_tokens=64, step_s=step_s).work
        for step_s in (lambda rows: 1.0, lambda rows: 1 + 10.0 * rows)
    )
    assert len(free) == 6
    assert [p.work.tokens for p in dear] == [p.work.tokens for p in free][:1]
    assert values[0] > values[1]
    for scheduled in (free, dear):
        _cancel(scheduled)


def test_the_step_time_is_learned_from_steps(prompt) -> None:
    drafter, model = make_drafter(skip_costly_rows=True)
    model.step_ms, model.row_ms = 1.0, 2.0
    targets = []
    for index in range(4):
        targets.append(ScriptedTarget(drafter, prompt[: 4 + index], name=f"s{index}"))
        exchange(drafter, targets, num_steps=4)
    assert drafter.step_time(10) > drafter.step_time(1) > 0.0005
