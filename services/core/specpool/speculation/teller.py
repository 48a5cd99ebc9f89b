"""What the speculator of one sequence is told."""

from __future__ import annotations

from collections.abc import Sequence

from specpool.speculation import messages
from specpool.speculation.connection import Connection, PlacedSequence
from specpool.speculation.draft import DraftSource
from specpool.speculation.outbox import Outbox
from specpool.v1 import speculator_pb2, types_pb2


class Teller:
    """Tells the speculator what it has to know. Used under the lock of its handle."""

    def __init__(self, outbox: Outbox, opening: speculator_pb2.OpenSequence) -> None:
        """`opening` has all that does not change."""
        self.connection: Connection | None = None
        """Connection that the sequence is placed at."""
        self.knows = False
        """Whether the sequence was opened there."""
        self.outcome: tuple[int, int] | None = None
        """Outcome (accepted length, bonus token) of the round that has ended, until it is told."""
        self._outbox = outbox
        self._opening = opening
        self._id = opening.sequence_id
        self._is_ssd = opening.mode == types_pb2.SPECULATION_MODE_SSD

    def attach(self, connection: Connection, sequence: PlacedSequence) -> bool:
        """Place the sequence at a connection; False if that has ended."""
        if not connection.attach(self._id, sequence):
            connection.detach(self._id)
            return False
        self.connection = connection
        return True

    def leave(self) -> None:
        """Close the sequence where it is, and place it nowhere."""
        self.withdraw()
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.detach(self._id)

    def withdraw(self) -> None:
        """Close the sequence where it is, which stays its place.

        Also where the speculator said that it does not have it: that may have been of an earlier opening.
        """
        connection, knew = self.connection, self.knows
        self.knows, self.outcome = False, None
        if knew and connection is not None and connection.is_open:
            self._send(connection, messages.close_sequence(self._id))

    def open(self, tokens: Sequence[int], round_: int, draft: Sequence[int]) -> None:
        """Hand over every token, and what the running round verifies."""
        if self.connection is not None:
            self.knows = True
            self._send(self.connection, messages.open_sequence(self._opening, tokens, round_, draft))

    def start(self, round_: int, draft: Sequence[int], source: DraftSource) -> None:
        """Tell what `round_` verifies, with the outcome before it unless that was told already."""
        if self.outcome is not None:
            self._report(round_, draft, source, False)
        elif self.connection is not None:
            self._send(self.connection, messages.start_round(self._id, round_, draft, source))

    def ask(self, round_: int, num_tokens: int, deadline_s: float) -> bool:
        """Ask for `num_tokens` tokens for `round_` now; False if nobody can draft them."""
        connection = self.connection
        if connection is None or not connection.is_open or self.outcome is None:
            return False
        self._report(round_, (), DraftSource.NONE, True)
        self._send(connection, messages.speculate_now(self._id, round_ - 1, num_tokens, deadline_s))
        return True

    def _report(self, round_: int, draft: Sequence[int], source: DraftSource, awaits: bool) -> None:
        assert self.outcome is not None, "checked by both callers"
        num_accepted, bonus_token = self.outcome
        self.outcome = None
        connection = self.connection
        if connection is not None:
            outcome = speculator_pb2.Outcome(
                sequence_id=self._id,
                round=round_ - 1,
                num_accepted=num_accepted,
                bonus_token=bonus_token,
                draft_tokens=draft,
                draft_source=source,  # type: ignore[arg-type]
                awaits_speculation=awaits,
            )
            self._outbox.outcome(connection, self._id, outcome)
            if awaits or self._is_ssd:
                connection.expect_answer()

    def _send(self, connection: Connection, request: speculator_pb2.SpeculateRequest) -> None:
        self._outbox.send(connection, self._id, request)
