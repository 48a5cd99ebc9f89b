"""What a target verifies next, by what its speculator sent."""

from __future__ import annotations

from dataclasses import replace

import pytest
from one_speculator import LOOKAHEAD, OneSpeculator

from specpool.algorithm.verification import VerificationOutcome
from specpool.speculation import DraftSource
from specpool.v1 import speculator_pb2
from specpool_target.engine.sequence import SpeculationMode, TargetSequence
from specpool_target.next_round.fallback_policy import FallbackPolicy
from specpool_target.next_round.knowledge import KnowledgeEvents, SpeculatorKnowledge
from specpool_target.next_round.lookahead_policy import LookaheadPolicy
from specpool_target.next_round.next_round import NextRound
from specpool_target.next_round.speculation_trials import Verdict

STOP = 9
BONUS = 7
OUTCOME = VerificationOutcome(num_accepted=0, bonus_token=BONUS)


@pytest.fixture
def next_draft(request_for):
    """The draft after `OUTCOME`, and the statistics, by the tokens that the table has for it."""

    def run(drafted, *, prompt=(1, 2, 3)):
        request = replace(
            request_for("a", prompt, stop_token_ids=(STOP,)), mode=SpeculationMode.SSD, max_lookahead=LOOKAHEAD
        )
        policy, pool = FallbackPolicy(), OneSpeculator()
        knowledge = SpeculatorKnowledge(pool, KnowledgeEvents())
        next_round = NextRound(
            knowledge, policy, LookaheadPolicy(policy, max_lookahead=LOOKAHEAD), vocab_size=24, deadline_s=1.0
        )
        sequence = TargetSequence(request, max_length=100, backup_ngram=3)
        next_round.admit(sequence, batch_size=1)
        table = speculator_pb2.Table(round=0)
        table.entries.add(num_accepted=0, bonus_token=BONUS, draft_tokens=drafted)
        sequence.handle.take_table(pool.connection, table)
        sequence.tokens.append(BONUS)
        next_round.choose(sequence, OUTCOME, batch_size=1)
        return sequence.draft, sequence.stats

    return run


@pytest.mark.parametrize(
    ("drafted", "kind"),
    [([5, 6, 5, 6], "hit"), ([5, 6, 5], "partial"), ([5, STOP], "hit"), ([5, 6, 5, STOP], "hit"), ([], "late")],
)
async def test_a_draft_is_full_when_it_has_k_tokens_or_ends_the_output(next_draft, drafted, kind):
    draft, stats = next_draft(drafted)
    assert draft.lookup == kind
    assert draft.tokens[: len(drafted)] == drafted
    assert (stats.num_hits, stats.num_partial) == (kind == "hit", kind == "partial")


async def test_prompt_lookup_lengthens_a_draft_unless_it_ends_the_output(next_draft):
    draft, _ = next_draft([5, 6], prompt=(5, 6, 4, 3))
    assert (draft.tokens, draft.num_tail) == ([5, 6, 4, 3], 2)
    draft, _ = next_draft([5, STOP], prompt=(5, STOP, 4, 3))
    assert (draft.tokens, draft.num_tail) == ([5, STOP], 0)


class Told:
    """A policy that is told what to choose."""

    def __init__(self) -> None:
        self.trials = self
        self.now = Verdict.SPECULATE

    def lookahead(self, mode, measured, batch_size):
        return 0 if self.now is Verdict.PLAIN else LOOKAHEAD

    def verdict(self, mode, batch_size):
        return self.now

    def forget(self):
        self.now = Verdict.SPECULATE

    def worthwhile_backup(self, num_draft, num_backup, batch_size):
        return num_backup


class Chosen:
    """A sequence whose K is the target's choice, and what its speculator is told of it."""

    def __init__(self, request, mode) -> None:
        request = replace(request, mode=mode, leaves_lookahead=True)
        self.policy, self.pool = Told(), OneSpeculator()
        self.knowledge = SpeculatorKnowledge(self.pool, KnowledgeEvents())
        self.next_round = NextRound(self.knowledge, FallbackPolicy(), self.policy, vocab_size=24, deadline_s=1.0)
        self.sequence = TargetSequence(request, max_length=100, backup_ngram=3)

    def told(self, act=None):
        """By `act`, or by the next round."""
        if act is None:
            self.sequence.tokens.append(BONUS)
            self.next_round.choose(self.sequence, OUTCOME, batch_size=1)
        else:
            act()
        return self.pool.told()

    def admit(self):
        self.sequence.was_admitted = True
        self.next_round.admit(self.sequence, batch_size=1)


async def test_no_speculator_holds_a_sequence_while_speculation_pauses(request_for):
    chosen = Chosen(request_for("a", (1, 2, 3)), SpeculationMode.SSD)
    assert chosen.told(chosen.admit) == ["open_sequence"]
    assert chosen.told() == ["outcomes"]
    chosen.policy.now = Verdict.PLAIN
    assert chosen.told() == ["outcomes"]
    assert chosen.sequence.draft.tokens == []
    chosen.policy.now = Verdict.PAUSE
    assert chosen.told() == ["close_sequence"]
    assert chosen.told() == []
    assert chosen.sequence.draft.source is DraftSource.BACKUP  # prompt lookup goes on: it needs no speculator
    assert chosen.knowledge.is_served(chosen.sequence)
    chosen.policy.now = Verdict.SPECULATE
    assert chosen.told() == ["open_sequence"]
    assert chosen.told() == ["outcomes"]
    assert chosen.sequence.stats.num_misses == 2  # where there was no reason to look, nothing was missed


async def test_a_sequence_that_arrives_in_a_pause_is_not_opened(request_for):
    chosen = Chosen(request_for("a", (1, 2, 3)), SpeculationMode.SD)
    chosen.policy.now = Verdict.PAUSE
    assert chosen.told(chosen.admit) == []
    assert chosen.told() == []
    chosen.policy.now = Verdict.SPECULATE
    assert chosen.told() == ["open_sequence"]
    assert chosen.next_round.fallbacks == {}
    assert chosen.told() == ["outcomes", "speculate_now"]


async def test_a_speculator_that_comes_back_ends_the_pause(request_for):
    chosen = Chosen(request_for("a", (1, 2, 3)), SpeculationMode.SSD)
    chosen.told(chosen.admit)
    chosen.policy.now = Verdict.PAUSE
    chosen.told()
    chosen.pool.connect()
    chosen.policy.forget()
    assert chosen.told(lambda: chosen.knowledge.resume(chosen.sequence)) == ["open_sequence"]
    assert chosen.told() == ["outcomes"]


async def test_a_speculator_that_is_lost_while_a_draft_is_requested_costs_nothing(request_for):
    chosen = Chosen(request_for("a", (1, 2, 3)), SpeculationMode.SD)
    chosen.told(chosen.admit)
    chosen.pool.connection.is_open = False
    assert chosen.told() == ["outcomes"]
    assert chosen.sequence.await_deadline_s is None
    assert chosen.next_round.fallbacks == {"speculator_lost": 1}
