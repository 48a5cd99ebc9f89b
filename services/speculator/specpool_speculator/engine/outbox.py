"""Responses of one engine step, collected per target stream: one hand-over to the event loop, one table message."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch

from specpool.v1 import speculator_pb2
from specpool_speculator.dense.dense_rows import DenseRow
from specpool_speculator.dense.sending_group import Channel
from specpool_speculator.engine.refusals import Refused
from specpool_speculator.tree.node import TokenDistribution
from specpool_speculator.tree.sequence import Outcome, SequenceKey, SequenceState


class Outbox:
    """Responses by connection, in order, tables last."""

    def __init__(self) -> None:
        self._responses: dict[int, list[speculator_pb2.SpeculateResponse]] = defaultdict(list)
        self._tables: dict[int, speculator_pb2.Tables] = defaultdict(speculator_pb2.Tables)

    def speculation(self, connection: int, sequence_id: str, round_: int, draft_tokens: Iterable[int]) -> None:
        """Answer `speculate_now` with the tokens drafted so far."""
        answer = speculator_pb2.Speculation(sequence_id=sequence_id, round=round_, draft_tokens=draft_tokens)
        self._responses[connection].append(speculator_pb2.SpeculateResponse(speculation=answer))

    def distributions(
        self, sequence: SequenceState, found: Sequence[TokenDistribution | DenseRow] | None, channel: Channel | None
    ) -> None:
        """Send what the draft tokens in flight were sampled from; nothing in it if that is not known or cannot be sent.

        The target need not wait for something that does not come.
        """
        connection, sequence_id = sequence.key
        message = speculator_pb2.DraftDistributions(sequence_id=sequence_id, round=sequence.tree.round)
        rows = [d.probabilities for d in found or () if isinstance(d, DenseRow) and d.probabilities is not None]
        transfer = channel.offer(torch.stack(rows)) if rows and channel is not None else None
        if found is not None and (transfer is not None or not rows):
            message.draft_tokens.extend(sequence.tree.draft_tokens)
            message.distributions.extend(map(_sparse, found))
            if transfer is not None:
                message.transfer.CopyFrom(transfer)
        self._responses[connection].append(speculator_pb2.SpeculateResponse(draft_distributions=message))

    def resync(self, connection: int, sequence_id: str, reason: str) -> None:
        """Ask the target to open the sequence again."""
        message = speculator_pb2.Resync(sequence_id=sequence_id, reason=reason)
        self._responses[connection].append(speculator_pb2.SpeculateResponse(resync=message))

    def refused(self, key: SequenceKey, refusal: Refused) -> None:
        """Tell the target that its sequence is not drafted for; nothing about it follows."""
        connection, sequence_id = key
        if connection in self._tables:
            kept = [table for table in self._tables[connection].tables if table.sequence_id != sequence_id]
            self._tables[connection] = speculator_pb2.Tables(tables=kept)
        message = speculator_pb2.SequenceRefused(
            sequence_id=sequence_id,
            reason=refusal.reason,
            message=refusal.message,
            retry_after_ms=refusal.retry_after_ms,
        )
        self._responses[connection].append(speculator_pb2.SpeculateResponse(sequence_refused=message))

    def table(self, sequence: SequenceState, entries: Mapping[Outcome, Sequence[int]]) -> None:
        """Push new or longer entries of the running round's table."""
        connection, sequence_id = sequence.key
        table = self._tables[connection].tables.add(sequence_id=sequence_id, round=sequence.tree.round)
        add = table.entries.add
        for (num_accepted, bonus_token), tokens in entries.items():  # faster than by keywords
            entry = add()
            entry.num_accepted, entry.bonus_token = num_accepted, bonus_token
            if tokens:
                entry.draft_tokens.extend(tokens)

    def drop(self, connection: int) -> None:
        """Drop all responses to a target whose stream is gone."""
        self._responses.pop(connection, None)
        self._tables.pop(connection, None)

    def take(self) -> dict[int, list[speculator_pb2.SpeculateResponse]]:
        """Hand over all responses since the last call, by connection."""
        taken = self._responses
        for connection, tables in self._tables.items():
            taken[connection].append(speculator_pb2.SpeculateResponse(tables=tables))
        self._responses, self._tables = defaultdict(list), defaultdict(speculator_pb2.Tables)
        return taken


def _sparse(distribution: TokenDistribution | DenseRow) -> speculator_pb2.SparseDistribution:
    """The sparse distribution for the stream; empty for a dense row, which is in the transfer."""
    if isinstance(distribution, DenseRow):
        return speculator_pb2.SparseDistribution()
    return speculator_pb2.SparseDistribution(token_ids=distribution.token_ids, probabilities=distribution.probabilities)
