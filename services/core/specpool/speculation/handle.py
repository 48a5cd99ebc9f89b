"""One sequence in the pool: its tokens, the round that runs, and what its speculator knows and sent.

A round: `next` ends the one that ran and proposes what to verify; `started` says what is verified. In between the
engine may `request` a draft just in time. Whatever happens to speculators meanwhile, the engine sees it only as
drafts that are not there.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Sequence

from specpool.errors import InvalidArgument
from specpool.rpc.checks import MAX_DRAFT_TOKENS
from specpool.speculation.answer import Answer, OnAnswer
from specpool.speculation.connection import Connection
from specpool.speculation.draft import DraftSource, NextDraft, valid_tokens
from specpool.speculation.handle_owner import HandleOwner, SequenceEvents
from specpool.speculation.inbox import SpeculationInbox, read_table
from specpool.speculation.teller import Teller
from specpool.v1 import speculator_pb2


class SequenceHandle:
    """One sequence in the pool. May be used from any thread; nothing here blocks but `wait`, which has a deadline."""

    def __init__(
        self,
        owner: HandleOwner,
        opening: speculator_pb2.OpenSequence,
        tokens: Sequence[int],
        events: SequenceEvents,
        *,
        is_paused: bool = False,
    ) -> None:
        """`opening` has all that does not change."""
        self.id = opening.sequence_id
        self.placed_at_s = 0.0
        """Time (`monotonic`) at which it was given its speculator."""
        self.avoided: dict[str, float] = {}
        """Addresses that refused it, each with the time (`monotonic`) until which it is not placed there."""
        self._owner = owner
        self._opening = opening
        self._events = events
        self._tokens = array("I", tokens)
        self._inbox = SpeculationInbox(opening.max_lookahead)
        self._lock = threading.Lock()
        self._teller = Teller(owner.outbox, opening)
        self._round = 0
        self._draft: tuple[int, ...] = ()
        """Draft tokens that the running round verifies."""
        self._is_started = True
        """Whether it is decided what the running round verifies. Round 0 is the prefill, which verifies nothing."""
        self._answer = Answer()
        self._reopened_round: int | None = None
        self._is_paused = is_paused
        self._is_closed = False

    # ---- what engines may ask ---------------------------------------------------------------------------------

    @property
    def speculator(self) -> Connection | None:
        """The connection whose speculator knows the sequence: measurements, and how far it may be waited for."""
        connection = self._teller.connection
        return connection if connection is not None and self._teller.knows and connection.is_open else None

    @property
    def is_placed(self) -> bool:
        """Whether it has a speculator, or needs none."""
        return self._teller.connection is not None or self._is_paused or self._is_closed

    @property
    def is_waiting(self) -> bool:
        """Whether a requested draft is still to come."""
        return self._answer.is_due

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self._tokens)

    # ---- rounds -----------------------------------------------------------------------------------------------

    def next(self, num_accepted: int, bonus_token: int, *, lookahead: int | None = None) -> NextDraft:
        """Report how the round has ended; returns what to verify next, at most `lookahead` tokens.

        Args:
            num_accepted: so many of the tokens given to `started` are committed;
            bonus_token: and this one.
            lookahead: what the engine can use now, if less than the sequence was opened with.
        """
        with self._lock:
            self._settle()
            if not 0 <= num_accepted <= len(self._draft):
                raise InvalidArgument(f"{num_accepted} tokens accepted of {len(self._draft)}")
            self._tokens.extend(self._draft[:num_accepted])
            self._tokens.append(bonus_token)
            ended = self._round
            self._round, self._draft, self._is_started = ended + 1, (), False
            if not self._teller.knows:
                return NextDraft()
            self._teller.outcome = (num_accepted, bonus_token)
            if lookahead is None:
                lookahead = self._opening.max_lookahead
            found = self._inbox.lookup(ended, num_accepted, bonus_token, lookahead=max(1, lookahead))
        kind, tokens, rank = found
        valid = valid_tokens(tokens, self._owner.vocab_size)
        if len(valid) > lookahead:
            valid = valid[:lookahead]
        return found if valid is tokens else NextDraft(kind, valid, rank)

    def committed(self, tokens: Sequence[int], *, lookahead: int | None = None) -> NextDraft:
        """Report the tokens that the round committed, some of the draft and one more; otherwise like `next`."""
        if len(tokens) == 0:
            raise InvalidArgument("a round commits at least one token")
        if list(self._draft[: len(tokens) - 1]) != list(tokens[:-1]):
            raise InvalidArgument(f"committed {list(tokens)}, which does not begin with a part of {list(self._draft)}")
        return self.next(len(tokens) - 1, tokens[-1], lookahead=lookahead)

    def started(self, tokens: Sequence[int] = (), source: DraftSource | None = None) -> None:
        """Report the tokens that the next round verifies; by default they are the speculator's where there are any."""
        with self._lock:
            self._start(tuple(tokens), source)
        self._owner.reported()

    def request(self, num_tokens: int, deadline_s: float, on_answer: OnAnswer | None = None) -> bool:
        """Have tokens drafted now, between `next` and `started`; False if no speculator can.

        Args:
            num_tokens: at most.
            deadline_s: after which the speculator answers with what it has. Keep a longer one of your own.
            on_answer: called once, with nothing if the speculator is lost or has nothing, but not after `started`.
                Without it, `wait`.
        """
        with self._lock:
            if self._is_started or not self._teller.ask(self._round, num_tokens, deadline_s):
                return False
            self._answer.ask(on_answer)
        self._owner.reported()
        return True

    def wait(self, timeout_s: float) -> tuple[int, ...]:
        """Block for the tokens requested; none when the time is over."""
        self._owner.hurry()
        speculator = self.speculator
        return self._answer.wait(timeout_s, None if speculator is None else speculator.trust)

    # ---- draft distributions ----------------------------------------------------------------------------------

    def awaits_distributions(self) -> bool:
        """Whether draft distributions of the running round are still to come.

        Nobody sends those of a draft that a speculator was handed together with the sequence, as after a move.
        """
        return self._inbox.awaits_distributions(self._round)

    def take_distributions(self) -> object | None:
        """The running round's draft distributions: a message, or a dense transport's type. Later ones are dropped."""
        with self._lock:
            return self._inbox.take_distributions(self._round)

    # ---- in and out of the pool -------------------------------------------------------------------------------

    def pause(self) -> None:
        """Take the sequence from its speculator until `resume`; rounds go on being told to the handle."""
        with self._lock:
            self._is_paused = True
            answer = self._leave()
        self._left(answer)

    def resume(self) -> None:
        """Give the sequence to a speculator again."""
        with self._lock:
            if self._is_closed or not self._is_paused:
                return
            self._is_paused = False
        self._owner.place(self)

    def close(self) -> None:
        """Free the sequence everywhere. May be called twice."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            answer = self._leave()
        self._owner.forget(self)
        self._left(answer)

    def _left(self, answer: OnAnswer | None) -> None:
        self._owner.hurry()
        if answer is not None:
            answer(())

    # ---- for the pairing --------------------------------------------------------------------------------------

    def move(self, connection: Connection | None) -> None:
        """Leave one speculator for another, or for none."""
        with self._lock:
            if self._is_closed or self._is_paused:
                return None
            answer = self._leave()
            has_place = connection is not None and self._teller.attach(connection, self)
            if has_place:
                self.placed_at_s = time.monotonic()
                self._open_if_started()
        self._left(answer)
        if not has_place and connection is not None:
            return self._owner.place(self)  # it was lost in this moment
        return self._tell_place()

    def lost(self, connection: Connection) -> bool:
        """Leave a connection that has ended, or does not have the sequence; False if it had moved already."""
        with self._lock:
            if self._teller.connection is not connection:
                return False
            answer = self._leave()
        self._left(answer)
        self._tell_place()
        return True

    def _tell_place(self) -> None:
        """Tell the engine where it is now: two threads may tell it, and the later word must be the newer."""
        self._events.on_paired(self._teller.connection)

    # ---- from the connection, on the event loop ---------------------------------------------------------------

    def take_table(self, connection: Connection, table: speculator_pb2.Table) -> None:
        """Take in guesses about the running round; those of another speculator or round are dropped."""
        entries = read_table(table)
        with self._lock:
            if connection is self._teller.connection and table.round == self._round:
                self._inbox.add_table(table.round, entries)

    def take_speculation(self, connection: Connection, reply: speculator_pb2.Speculation) -> None:
        """Take in the answer to a request; that of another speculator or round is dropped."""
        with self._lock:
            if connection is not self._teller.connection or reply.round != self._round - 1:
                return
            answer = self._answer.take()
        if answer is not None:
            answer(valid_tokens(tuple(reply.draft_tokens[:MAX_DRAFT_TOKENS]), self._owner.vocab_size))

    def add_distributions(self, connection: Connection, round_: int, distributions: object) -> None:
        """Take in draft distributions; those of another speculator or round are dropped. Called on any thread."""
        with self._lock:
            if connection is not self._teller.connection or round_ != self._round:
                return
            self._inbox.add_distributions(round_, distributions)
        self._events.on_distributions()

    def reopen(self, connection: Connection) -> None:
        """Open the sequence again at a speculator that lost it; at most once per round."""
        with self._lock:
            teller = self._teller
            if connection is not teller.connection or not teller.knows or self._reopened_round == self._round:
                return
            self._reopened_round = self._round
            self._inbox.clear()
            teller.withdraw()
            answer = self._answer.take()
            self._open_if_started()
        self._left(answer)

    # ---- with the lock ----------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Start a round that the engine did not start: it verified nothing."""
        if not self._is_started:
            self._start((), DraftSource.NONE)

    def _start(self, tokens: tuple[int, ...], source: DraftSource | None) -> None:
        if self._is_started:
            raise InvalidArgument(f"round {self._round} has started already")
        if source is None:
            source = DraftSource.SPECULATOR if tokens else DraftSource.NONE
        self._answer.drop()
        self._draft, self._is_started = tokens, True
        if self._teller.knows:
            if tokens and source is DraftSource.SPECULATOR:
                self._inbox.expect_distributions(self._round)
            self._teller.start(self._round, tokens, source)
        else:
            self._open_if_started()

    def _open_if_started(self) -> None:
        """Hand the sequence over if it is decided what the running round verifies; else `started` does it."""
        if self._is_started:
            self._teller.open(self._tokens, self._round, self._draft)

    def _leave(self) -> OnAnswer | None:
        """Close the sequence where it is; returns the callback that waits for an answer."""
        self._inbox.clear()
        self._teller.leave()
        return self._answer.take()
