"""What a target verifies next, by what its speculator sent."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from specpool.algorithm.verification import VerificationOutcome
from specpool.v1 import speculator_pb2
from specpool_target.fallback_policy import FallbackPolicy
from specpool_target.link import LinkMeasurements, SpeculationInbox
from specpool_target.lookahead import LookaheadPlanner
from specpool_target.outbox import Outbox
from specpool_target.sequence import SpeculationMode, TargetSequence
from specpool_target.speculation import Speculation

LOOKAHEAD, STOP = 4, 9
BONUS = 7
OUTCOME = VerificationOutcome(num_accepted=0, bonus_token=BONUS)


class ConnectedLink:
    """A link as far as the engine looks at it."""

    def __init__(self) -> None:
        self.measured = LinkMeasurements(max_lookahead=LOOKAHEAD)
        self.is_connected = True
        self.sent: list[str] = []

    def send(self, epoch, requests):
        self.sent += [request.WhichOneof("message") for request in requests]


@pytest.fixture
def next_draft(request_for):
    """The draft after `OUTCOME`, and the statistics, by the tokens that the table has for it."""

    def run(drafted, *, prompt=(1, 2, 3)):
        request = replace(
            request_for("a", prompt, stop_token_ids=(STOP,)), mode=SpeculationMode.SSD, max_lookahead=LOOKAHEAD
        )
        policy = FallbackPolicy(max_batch_size=4, lookahead=LOOKAHEAD)
        speculation = Speculation(
            Outbox(asyncio.get_running_loop()),
            policy,
            LookaheadPlanner(policy, max_lookahead=LOOKAHEAD),
            vocab_size=24,
            deadline_s=1.0,
        )
        link, inbox = ConnectedLink(), SpeculationInbox(LOOKAHEAD)
        sequence = TargetSequence(
            request, emit=lambda update: None, link=link, inbox=inbox, max_length=100, backup_ngram=3
        )
        sequence.was_admitted = True
        speculation.link_up(link, 1, [sequence])
        table = speculator_pb2.Table(round=0)
        table.entries.add(num_accepted=0, bonus_token=BONUS, draft_tokens=drafted)
        inbox.add_table(table)
        sequence.tokens.append(BONUS)
        speculation.next_round(sequence, OUTCOME, batch_size=1)
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


class Plan:
    """A planner that is told what to plan."""

    value = LOOKAHEAD

    def lookahead(self, mode, measured, batch_size):
        return self.value

    def worthwhile_backup(self, num_draft, num_backup, batch_size):
        return num_backup


async def test_no_speculator_holds_a_sequence_that_is_not_speculated_on(request_for):
    request = replace(request_for("a", (1, 2, 3)), mode=SpeculationMode.SSD, plans_lookahead=True)
    plan, outbox = Plan(), Outbox(asyncio.get_running_loop())
    policy = FallbackPolicy(max_batch_size=4, lookahead=LOOKAHEAD)
    speculation = Speculation(outbox, policy, plan, vocab_size=24, deadline_s=1.0)
    link, inbox = ConnectedLink(), SpeculationInbox(LOOKAHEAD)
    sequence = TargetSequence(request, emit=print, link=link, inbox=inbox, max_length=100, backup_ngram=3)
    speculation.link_up(link, 1, [])
    sent = []

    async def after(act):
        act()
        outbox.flush()
        await asyncio.sleep(0)
        sent[:], link.sent = link.sent, []
        return sent

    def next_round():
        sequence.tokens.append(BONUS)
        speculation.next_round(sequence, OUTCOME, batch_size=1)

    assert await after(lambda: speculation.admit(sequence, batch_size=1)) == ["open_sequence"]
    assert await after(next_round) == ["outcomes"]
    plan.value = 0
    assert await after(next_round) == ["close_sequence"]
    assert await after(next_round) == []
    assert sequence.draft.tokens == []
    assert await after(lambda: speculation.link_up(link, 2, [sequence])) == []
    plan.value = LOOKAHEAD
    assert await after(next_round) == ["open_sequence"]
    assert await after(next_round) == ["outcomes"]
    assert sequence.stats.num_misses == 3  # not while it was paused
