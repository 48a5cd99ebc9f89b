"""What a target says about one sequence."""

from __future__ import annotations

from collections.abc import Sequence

from specpool.speculation.draft import DraftSource
from specpool.v1 import speculator_pb2

Request = speculator_pb2.SpeculateRequest


def open_sequence(
    opening: speculator_pb2.OpenSequence, tokens: Sequence[int], round_: int, draft_tokens: Sequence[int]
) -> Request:
    """The message that hands a sequence over. `opening` has all that does not change."""
    request = Request(open_sequence=opening)
    message = request.open_sequence
    message.token_ids.extend(tokens)
    message.round = round_
    message.draft_tokens.extend(draft_tokens)
    return request


def speculate_now(sequence_id: str, round_: int, num_tokens: int, deadline_s: float) -> Request:
    """The message that asks for a draft for the round after `round_`."""
    return Request(
        speculate_now=speculator_pb2.SpeculateNow(
            sequence_id=sequence_id, round=round_, num_tokens=num_tokens, deadline_ms=deadline_s * 1e3
        )
    )


def start_round(sequence_id: str, round_: int, draft_tokens: Sequence[int], source: DraftSource) -> Request:
    """The message that says what a round verifies whose beginning had to wait."""
    return Request(
        start_round=speculator_pb2.StartRound(
            sequence_id=sequence_id, round=round_, draft_tokens=draft_tokens, draft_source=source.value
        )
    )


def close_sequence(sequence_id: str) -> Request:
    """The message that frees a sequence at the speculator."""
    return Request(close_sequence=speculator_pb2.CloseSequence(sequence_id=sequence_id))
