"""What a sequence verifies next, as plain data."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from specpool.algorithm.speculation_cache import LookupKind
from specpool.v1 import speculator_pb2


class DraftSource(IntEnum):
    """Where the tokens that a round verifies come from; the numbers are the protocol's."""

    NONE = speculator_pb2.DRAFT_SOURCE_NONE
    SPECULATOR = speculator_pb2.DRAFT_SOURCE_SPECULATOR
    """The speculator drafted them, ahead or just in time; an engine's own tokens may follow."""
    BACKUP = speculator_pb2.DRAFT_SOURCE_BACKUP
    """The engine has them from elsewhere, from prompt lookup for example."""


class NextDraft(NamedTuple):
    """What the pool proposes after an outcome."""

    kind: LookupKind | None = None
    """What the lookup found; None: nothing was looked up, since no speculator knows the sequence."""
    tokens: tuple[int, ...] = ()
    """Draft tokens to verify next; empty when late, missed or not looked up."""
    rank: int | None = None
    """Rank of the bonus token among the guesses of its position, from 0; None: not among them."""


def valid_tokens(tokens: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """The tokens up to the first that a model with `vocab_size` tokens does not have."""
    if not tokens or max(tokens) < vocab_size:
        return tokens
    return tokens[: next(index for index, token in enumerate(tokens) if token >= vocab_size)]
