"""Sequences that are not speculated for, and why."""

from __future__ import annotations

from collections import Counter
from typing import Final, TypeAlias

from specpool.v1 import speculator_pb2
from specpool_speculator.tree.sequence import SequenceKey

Reason: TypeAlias = "speculator_pb2.RefusalReason.ValueType"
_MAX_REMEMBERED: Final = 4096
"""Refused sequences remembered per connection; a target that goes on about more is asked to open the oldest again."""
RETRY_AFTER_MS: Final = 1000
"""Milliseconds after which a sequence may be offered again, where the reason may pass."""


class Refused(Exception):
    """Raised for a sequence that is not taken, with the reason that its target is told."""

    def __init__(self, reason: Reason, message: str, *, retry_after_ms: int = 0) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retry_after_ms = retry_after_ms


class Refusals:
    """Counts refusals, and remembers them: what a target says before it hears of one is ignored."""

    def __init__(self) -> None:
        self.counts: Counter[Reason] = Counter()
        """Number of refusals since the start, by reason."""
        self._keys: dict[int, dict[str, None]] = {}

    def __contains__(self, key: SequenceKey) -> bool:
        return key[1] in self._keys.get(key[0], ())

    def add(self, key: SequenceKey, reason: Reason) -> None:
        """Count and remember a sequence that was refused."""
        self.counts[reason] += 1
        connection, sequence_id = key
        ids = self._keys.setdefault(connection, {})
        ids[sequence_id] = None
        if len(ids) > _MAX_REMEMBERED:
            del ids[next(iter(ids))]

    def discard(self, key: SequenceKey) -> None:
        """Forget a refusal: the sequence is closed, or opened again."""
        self._keys.get(key[0], {}).pop(key[1], None)

    def disconnect(self, connection: int) -> None:
        """Forget the refusals of a stream that ended."""
        self._keys.pop(connection, None)


def label(reason: Reason) -> str:
    """Name of the reason in metrics and logs, such as `kv_cache_full`."""
    return speculator_pb2.RefusalReason.Name(reason).removeprefix("REFUSAL_REASON_").lower()
