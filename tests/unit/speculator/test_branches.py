"""Branches that are kept while they grow are those that the tree says anew, whatever happens to it."""

from __future__ import annotations

import random

import pytest

from .conftest import ScriptedTarget, exchange, make_drafter


def described(branches):
    return [
        (one.outcome, one.tokens, one.parent, one.token, one.is_open, one.is_worth_a_step, one.is_best)
        + ((pytest.approx(one.value), pytest.approx(one.probability)) if one.is_open else ())
        for one in branches
    ]


@pytest.mark.parametrize("policy", ["best_first", "geometric"])
@pytest.mark.parametrize("seed", range(4))
def test_kept_branches_are_those_found_anew(prompt, policy, seed) -> None:
    draw = random.Random(seed)
    drafter, model = make_drafter(fan_out_policy=policy, row_budget=7, fan_out_budget=9, num_blocks=60)
    targets = [ScriptedTarget(drafter, [name, *prompt], name=str(name), lookahead=4) for name in (1, 2, 3)]
    num_checked = 0
    for _ in range(60):
        exchange(drafter, targets, num_steps=draw.randint(1, 3))
        for sequence in drafter.held:
            assert described(sequence.branches()) == described(sequence.find_branches())
            num_checked += len(sequence.branches())
        target = draw.choice(targets)
        if draw.random() < 0.1:
            next(iter(drafter.held)).tree.prune()
        if target.table and draw.random() < 0.8:
            (k, bonus), tokens = draw.choice(list(target.table.items()))
            target.outcome(k, bonus, tokens[: draw.randint(0, len(tokens))])
        else:
            target.outcome(0, draw.randrange(model.vocab_size))
    assert num_checked > 500
